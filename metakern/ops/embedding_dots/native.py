"""embedding_dots in one pass, rows of V read where they lie: C++ on the CPU, CUDA on the GPU; sums in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops import extension
from metakern.ops.operands import accumulator

_CPU_KERNELS = {
    torch.float32: "embedding_dots_f32",
    torch.float64: "embedding_dots_f64",
    torch.bfloat16: "embedding_dots_bf16",
}


def supports(indices: Tensor, V: Tensor, B: Tensor, padding_idx: int = -1) -> str | None:
    reason = extension.unsupported(B)
    if reason is not None:
        return reason
    if not B.is_cuda and B.dtype not in _CPU_KERNELS:
        return f"the CPU kernel takes float32, float64 and bfloat16; got {B.dtype}"
    if B.shape[2] > 1 and (V.stride(1) != 1 or B.stride(2) != 1):
        return "rows must be contiguous"
    return None


def embedding_dots(indices: Tensor, V: Tensor, B: Tensor, padding_idx: int = -1) -> Tensor:
    n, t, width = B.shape
    indices = indices.to(torch.int64).contiguous()
    out = torch.empty(n, dtype=accumulator(B.dtype), device=B.device)
    sizes = (n, t, width, V.shape[0], V.stride(0), B.stride(0), B.stride(1), padding_idx)
    operands = (indices.data_ptr(), V.data_ptr(), B.data_ptr())
    if not B.is_cuda:
        wrong = getattr(extension.cpu, _CPU_KERNELS[B.dtype])(*operands, out.data_ptr(), *sizes)
        if wrong >= 0:
            raise IndexError(
                f"embedding_dots: indices must be in [0, {V.shape[0]}); got {int(indices.flatten()[wrong])}"
            )
        return out
    chunks = extension.cuda.embedding_dots_chunks(t)
    workspace = torch.empty(n * chunks if chunks > 1 else 0, dtype=out.dtype, device=B.device)
    buffers = (*operands, workspace.data_ptr(), out.data_ptr())
    extension.cuda.embedding_dots(extension.SCALARS[B.dtype], *buffers, *sizes, extension.stream(B))
    return out
