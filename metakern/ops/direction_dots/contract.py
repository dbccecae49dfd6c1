"""direction_dots: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator, check_operands

SCHEMA = "direction_dots(Tensor A, Tensor V, Tensor B, *, str? impl=None) -> Tensor"


def check(A: Tensor, V: Tensor, B: Tensor) -> None:
    check_operands("direction_dots", {"A": "nti", "V": "oi", "B": "nto"}, (A, V, B), rounded=("A", "V"))


def fake(A: Tensor, V: Tensor, B: Tensor) -> Tensor:
    return A.new_empty(A.shape[0], dtype=accumulator(B.dtype))


def flops(A: Tensor, V: Tensor, B: Tensor) -> int:
    n, t, i = A.shape
    o = B.shape[2]
    return 2 * n * t * i * o + 2 * n * t * min(i, o)


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    sizes = ((2, 3, 4), (5, 4), (2, 3, 5))
    return tuple(torch.ones(size, device=device) for size in sizes)
