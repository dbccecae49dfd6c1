"""weighted_kernel_grad by the device's own kernel gradient, of the kept examples, on a CPU in chunks that stay in its
cache.

The library's convolutions take twice as long an example where operands are far above the cache, and a gathered chunk
takes memory that is in use already (docs/measured-facts.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metakern.ops.convolution import library_gradient
from metakern.ops.layout import examples_per_chunk
from metakern.ops.operands import accumulator
from metakern.ops.waiting import host_may_wait
from metakern.ops.weighted_kernel_grad.reference import in_kernel_order


def weighted_kernel_grad(
    A: Tensor, B: Tensor, w: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int = 1, bias: bool = False, kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    like, settings = kernel.to(A.dtype), (stride, padding, dilation, groups, bias)
    w = w.view(-1, *(1,) * (B.dim() - 1))
    if kept is None and not host_may_wait():  # to know which are kept
        scaled = (B * w).to(B.dtype).masked_fill(w == 0, 0)  # not 0 * inf
        return in_kernel_order(*library_gradient(A, scaled, like, *settings), kernel, A.dtype)
    listed = w.flatten().nonzero().squeeze(1) if kept is None else kept
    if listed.numel() == 0:
        return torch.zeros_like(kernel, dtype=A.dtype), A.new_zeros(kernel.shape[0] if bias else 0)
    chunks = listed.split(examples_per_chunk(A, B))
    grad, shift = _part(A, B, w, chunks[0], like, settings)
    for chunk in chunks[1:]:
        more_grad, more_shift = _part(A, B, w, chunk, like, settings)
        dtype = accumulator(A.dtype)  # rounded once, however many chunks there are
        grad, shift = grad.to(dtype).add_(more_grad), shift.to(dtype).add_(more_shift)
    return in_kernel_order(grad, shift, kernel, A.dtype)


def _part(A: Tensor, B: Tensor, w: Tensor, examples: Tensor, kernel: Tensor, settings: tuple) -> tuple[Tensor, Tensor]:
    scaled = B.index_select(0, examples).mul_(w.index_select(0, examples))
    return library_gradient(A.index_select(0, examples), scaled, kernel, *settings)
