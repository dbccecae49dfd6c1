"""weighted_kernel_grad by the device's own kernel gradient, of the kept examples, on a CPU in chunks that stay in its
cache.

The library's convolutions take twice as long per example if operands are far larger than the cache, and gathered chunks
reuse the memory of earlier ones (docs/measured-facts.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    if kept is None and not host_may_wait():  # to find out which are kept
        scaled = (B * w).to(B.dtype).masked_fill(w == 0, 0)  # not 0 * inf
        return in_kernel_order(*library_gradient(A, scaled, like, *settings), kernel, A.dtype)
    listed = w.flatten().nonzero().squeeze(1) if kept is None else kept
    if listed.numel() == 0:
        return torch.zeros_like(kernel, dtype=A.dtype), A.new_zeros(kernel.shape[0] if bias else 0)
    chunks = _chunks(A, B, w, listed)
    grad, shift = library_gradient(*next(chunks), like, *settings)
    for a, b in chunks:
        more_grad, more_shift = library_gradient(a, b, like, *settings)
        dtype = accumulator(A.dtype)  # rounded once, however many chunks there are
        grad, shift = grad.to(dtype).add_(more_grad), shift.to(dtype).add_(more_shift)
    return in_kernel_order(grad, shift, kernel, A.dtype)


def _chunks(A: Tensor, B: Tensor, w: Tensor, kept: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A and the scaled B of some of the kept examples at a time; where all are kept A is not copied."""
    size = examples_per_chunk(A, B)
    if kept.numel() == len(w):
        for a, b, some in zip(A.split(size), B.split(size), w.split(size), strict=True):
            yield a, (b * some).to(b.dtype)
    else:
        for rows in kept.split(size):
            yield A.index_select(0, rows), B.index_select(0, rows).mul_(w.index_select(0, rows))
