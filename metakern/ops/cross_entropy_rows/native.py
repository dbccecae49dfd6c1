"""cross_entropy_rows while a row is in the cache: C++ on the CPU, one launch on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops import extension
from metakern.ops.operands import accumulator


def supports(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0) -> str | None:
    reason = extension.unsupported(logits)
    if reason is not None:
        return reason
    if not logits.is_cuda and logits.dtype is not torch.float32:
        return f"the CPU kernel takes float32; got {logits.dtype}"
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return "rows must be contiguous"
    return None


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape
    targets = targets.contiguous()
    losses = torch.empty(rows, dtype=accumulator(logits.dtype), device=logits.device)
    grad = torch.empty(rows, classes, dtype=logits.dtype, device=logits.device)
    buffers = (logits.data_ptr(), targets.data_ptr(), losses.data_ptr(), grad.data_ptr())
    options = (rows, classes, logits.stride(0), ignore_index, label_smoothing)
    if logits.is_cuda:
        with torch.cuda.device(logits.device):
            dtype = extension.SCALARS[logits.dtype]
            extension.cuda.cross_entropy_rows(dtype, *buffers, *options, extension.stream(logits))
        return losses, grad
    wrong = extension.cpu.cross_entropy_rows(*buffers, *options)
    if wrong >= 0:
        raise IndexError(
            f"cross_entropy_rows: targets must be in [0, {classes}) or {ignore_index}; got {int(targets[wrong])}"
        )
    return losses, grad
