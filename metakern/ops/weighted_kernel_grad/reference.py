"""weighted_kernel_grad by the library, of the kept examples at once in the accumulating dtype: the truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metakern.ops.convolution import library_gradient
from metakern.ops.operands import accumulator


def weighted_kernel_grad(
    A: Tensor, B: Tensor, w: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int = 1, bias: bool = False, kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = accumulator(A.dtype)
    # a row of weight zero contributes nothing, not 0 * inf = nan
    listed = w.nonzero().squeeze(1) if kept is None else kept
    if listed.numel() == 0:
        return torch.zeros_like(kernel, dtype=A.dtype), A.new_zeros(kernel.shape[0] if bias else 0)
    scaled = B[listed].to(dtype) * w[listed].to(dtype).view(-1, *(1,) * (B.dim() - 1))
    found = library_gradient(A[listed].to(dtype), scaled, kernel.to(dtype), stride, padding, dilation, groups, bias)
    return in_kernel_order(*found, kernel, A.dtype)


def in_kernel_order(grad: Tensor, shift: Tensor, kernel: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in `dtype`, the gradient laid out in memory as the kernel is."""
    if grad.stride() != kernel.stride() or grad.dtype is not dtype:
        grad = torch.empty_like(kernel, dtype=dtype).copy_(grad)
    return grad, shift.to(dtype)
