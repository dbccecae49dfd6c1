"""affine_dots without writing the normalised input: C++ on the CPU, CUDA on the GPU; sums in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops import extension
from metakern.ops.operands import accumulator

_CPU_KERNELS = {
    torch.float32: "affine_dots_f32",
    torch.float64: "affine_dots_f64",
    torch.bfloat16: "affine_dots_bf16",
}


def supports(
    X: Tensor, B: Tensor, V: Tensor, v: Tensor | None = None, eps: float = 1e-5, centred: bool = True
) -> str | None:
    reason = extension.unsupported(X)
    if reason is not None:
        return reason
    if not X.is_cuda and X.dtype not in _CPU_KERNELS:
        return f"the CPU kernel takes float32, float64 and bfloat16; got {X.dtype}"
    if X.shape[2] > 1 and (X.stride(2) != 1 or B.stride(2) != 1):
        return "rows must be contiguous"
    return None


def affine_dots(
    X: Tensor, B: Tensor, V: Tensor, v: Tensor | None = None, eps: float = 1e-5, centred: bool = True
) -> Tensor:
    n, t, width = X.shape
    out = torch.empty(n, dtype=accumulator(X.dtype), device=X.device)
    V = V.contiguous()
    v = None if v is None else v.contiguous()
    operands = (X.data_ptr(), B.data_ptr(), V.data_ptr(), 0 if v is None else v.data_ptr())
    sizes = (n, t, width, X.stride(0), X.stride(1), B.stride(0), B.stride(1), eps, centred)
    if not X.is_cuda:
        getattr(extension.cpu, _CPU_KERNELS[X.dtype])(*operands, out.data_ptr(), *sizes)
        return out
    chunks = extension.cuda.affine_dots_chunks(t)
    workspace = torch.empty(n * chunks if chunks > 1 else 0, dtype=out.dtype, device=X.device)
    buffers = (*operands, workspace.data_ptr(), out.data_ptr())
    with torch.cuda.device(X.device):
        extension.cuda.affine_dots(extension.SCALARS[X.dtype], *buffers, *sizes, extension.stream(X))
    return out
