"""clip_normalise in one call: C++ on the CPU, one launch without synchronisation on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops import extension


def supports(dots: Tensor) -> str | None:
    reason = extension.unsupported(dots)
    if reason is None and not dots.is_cuda and dots.dtype not in (torch.float32, torch.float64):
        return f"the CPU kernel takes float32 and float64; got {dots.dtype}"
    return reason


def clip_normalise(dots: Tensor) -> Tensor:
    weights = torch.empty_like(dots)  # contiguous, as anything of one dimension is
    buffers = (dots.data_ptr(), weights.data_ptr(), len(dots), dots.stride(0))
    if dots.is_cuda:
        extension.cuda.clip_normalise(extension.SCALARS[dots.dtype], *buffers, extension.stream(dots))
    elif dots.dtype is torch.float32:
        extension.cpu.clip_normalise_f32(*buffers)
    else:
        extension.cpu.clip_normalise_f64(*buffers)
    return weights
