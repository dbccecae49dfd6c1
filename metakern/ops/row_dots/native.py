"""row_dots in one pass over both operands, C++ on the CPU and CUDA on the GPU; sums in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops import extension
from metakern.ops.operands import accumulator

_CPU_KERNELS = {torch.float32: "row_dots_f32", torch.float64: "row_dots_f64", torch.bfloat16: "row_dots_bf16"}


def supports(X: Tensor, Y: Tensor) -> str | None:
    reason = extension.unsupported(X)
    if reason is not None:
        return reason
    if X.is_cpu and X.dtype not in _CPU_KERNELS:
        return f"the CPU kernel takes float32, float64 and bfloat16; got {X.dtype}"
    if X.shape[1] > 1 and (X.stride(1) != 1 or Y.stride(1) != 1):
        return "rows must be contiguous"
    return None


def row_dots(X: Tensor, Y: Tensor) -> Tensor:
    n, k = X.shape
    out = torch.empty(n, dtype=accumulator(X.dtype), device=X.device)
    sizes = (n, k, X.stride(0), Y.stride(0))
    if not X.is_cuda:
        kernel = getattr(extension.cpu, _CPU_KERNELS[X.dtype])
        kernel(X.data_ptr(), Y.data_ptr(), out.data_ptr(), *sizes)
        return out
    chunks = extension.cuda.row_dots_chunks(k)
    workspace = torch.empty(n * chunks if chunks > 1 else 0, dtype=out.dtype, device=X.device)
    buffers = (X.data_ptr(), Y.data_ptr(), workspace.data_ptr(), out.data_ptr())
    extension.cuda.row_dots(extension.SCALARS[X.dtype], *buffers, *sizes, extension.stream(X))
    return out
