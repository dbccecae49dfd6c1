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
    grad, shift = start, B.new_zeros(o if bias else 0)
    for a, b, some in _parts(A, B, w, size):
        if bias:
            shift += _bias(b, some)
        some = some.view(-1, 1, 1)
        a, b = (_scaled(a, some), b) if i < o else (a, _scaled(b, some))
        operands = b.flatten(0, 1).t(), a.flatten(0, 1)
        if grad is None:
            grad = torch.mm(*operands)
        else:
            grad = torch.addmm(grad, *operands) if grad is start else grad.addmm_(*operands)
    assert grad is not None
    return grad, shift


def _parts(A: Tensor, B: Tensor, w: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A, B and w of the kept examples, so many at a time; one part at least, of no example where none is kept. All are
    taken where the host may not wait to know which."""
    kept = w.nonzero().squeeze(1) if host_may_wait() else w
    if len(kept) == len(w):
        yield from zip(A.split(size), B.split(size), w.split(size), strict=True)
    elif size == 1 and len(kept):
        for n in kept.tolist():
            yield A[n : n + 1], B[n : n + 1], w[n : n + 1]
    else:
        for some in kept.split(size):
            yield A.index_select(0, some), B.index_select(0, some), w.index_select(0, some)


def _bias(B: Tensor, w: Tensor) -> Tensor:
    """sum_nt w_n B_nt, every position with the weight of its example."""
    t = B.shape[1]
    rows = w.to(accumulator(B.dtype)) if t == 1 else w.to(accumulator(B.dtype)).repeat_interleave(t)
    return torch.mv(B.flatten(0, 1).t().to(rows.dtype), rows).to(B.dtype)


def _scaled(narrow: Tensor, w: Tensor) -> Tensor:
    """The narrower operand times the weights, kept in the wider dtype of the two until it is rounded once."""
    return (narrow * w).to(narrow.dtype)
