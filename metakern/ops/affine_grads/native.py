"""affine_grads in one pass over both operands: C++ on the CPU, CUDA on the GPU; sums in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops import extension
from metakern.ops.affine_grads.contract import fake

_CPU_KERNELS = {
    torch.float32: "affine_grads_f32",
    torch.float64: "affine_grads_f64",
    torch.bfloat16: "affine_grads_bf16",
}
WIDEST = 4096
"""Elements of a row that a CUDA block keeps in its registers, whatever the dtype and alignment."""


def supports(X: Tensor, B: Tensor, eps: float = 1e-5, centred: bool = True, shift: bool = True) -> str | None:
    reason = extension.unsupported(X)
    if reason is not None:
        return reason
    if not X.is_cuda and X.dtype not in _CPU_KERNELS:
        return f"the CPU kernel takes float32, float64 and bfloat16; got {X.dtype}"
    if X.is_cuda and X.shape[2] > WIDEST:
        return f"the CUDA kernel takes rows of up to {WIDEST} elements; got {X.shape[2]}"
    if X.shape[2] > 1 and (X.stride(2) != 1 or B.stride(2) != 1):
        return "rows must be contiguous"
    return None


def affine_grads(
    X: Tensor, B: Tensor, eps: float = 1e-5, centred: bool = True, shift: bool = True
) -> tuple[Tensor, Tensor]:
    n, t, width = X.shape
    G, H = fake(X, B, eps, centred, shift)
    outputs = (G.data_ptr(), H.data_ptr() if shift else 0)
    sizes = (n, t, width, X.stride(0), X.stride(1), B.stride(0), B.stride(1), eps, centred)
    if not X.is_cuda:
        getattr(extension.cpu, _CPU_KERNELS[X.dtype])(X.data_ptr(), B.data_ptr(), *outputs, *sizes)
        return G, H
    chunks = extension.cuda.affine_grads_chunks(n, t)
    workspace = torch.empty(2 * n * width * chunks if chunks > 1 else 0, dtype=G.dtype, device=X.device)
    buffers = (X.data_ptr(), B.data_ptr(), workspace.data_ptr(), *outputs)
    extension.cuda.affine_grads(extension.SCALARS[X.dtype], *buffers, *sizes, extension.stream(X))
    return G, H
