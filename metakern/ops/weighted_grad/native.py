"""weighted_grad by the device's own matrix product over the kept rows only, some examples at a time.

The kept rows of a part are gathered and scaled while they stay in the cache, so that what is copied is bounded, and the
product of the part adds to those before it. An example that fills a part alone is not gathered but taken as it lies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metakern.ops.layout import examples_per_tile
from metakern.ops.operands import accumulator
from metakern.ops.waiting import host_may_wait


def weighted_grad(
    A: Tensor, B: Tensor, w: Tensor, bias: bool = False, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _, t, i = A.shape
    o = B.shape[2]
    # In a narrower dtype than sums are taken in, every part would be rounded.
    size = examples_per_tile(t, i + o) if A.dtype is accumulator(A.dtype) else max(1, len(w))
    grad, shift = start, None
    for a, b, some in _parts(A, B, w, size):
        rows = b.flatten(0, 1)
        if bias:
            shift = _bias(rows, some, t) if shift is None else shift.add_(_bias(rows, some, t))
        some = some.view(-1, 1, 1)
        if i < o:
            a = _scaled(a, some)
        else:
            rows = _scaled(b, some).flatten(0, 1)
        operands = rows.t(), a.flatten(0, 1)
        if grad is None:
            grad = torch.mm(*operands)
        else:
            grad = torch.addmm(grad, *operands) if grad is start else grad.addmm_(*operands)
    assert grad is not None
    return grad, B.new_empty(0) if shift is None else shift


def _parts(A: Tensor, B: Tensor, w: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A, B and w of the kept examples, `size` at a time; at least one part, which is empty if none is kept. If the host
    may not wait to find out which are kept, all examples are taken."""
    kept = w.nonzero().squeeze(1) if host_may_wait() else w
    count, all_kept = kept.numel(), kept.numel() == w.numel()
    if count <= size:
        yield (A, B, w) if all_kept else _picked(A, B, w, kept)
    elif all_kept:
        yield from zip(A.split(size), B.split(size), w.split(size), strict=True)
    elif size == 1:
        for n in kept.tolist():
            yield A[n : n + 1], B[n : n + 1], w[n : n + 1]
    else:
        for some in kept.split(size):
            yield _picked(A, B, w, some)


def _picked(A: Tensor, B: Tensor, w: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return A.index_select(0, rows), B.index_select(0, rows), w.index_select(0, rows)


def _bias(B: Tensor, w: Tensor, t: int) -> Tensor:
    """sum_nt w_n B_nt for B in rows [n t, o], every position with the weight of its example."""
    positions = w.to(accumulator(B.dtype))
    if t != 1:
        positions = positions.repeat_interleave(t)
    return torch.mv(B.t().to(positions.dtype), positions).to(B.dtype)


def _scaled(narrow: Tensor, w: Tensor) -> Tensor:
    """The narrower operand times the weights, kept in the wider dtype of the two until it is rounded once."""
    return (narrow * w).to(narrow.dtype)
