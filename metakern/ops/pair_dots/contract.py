"""pair_dots: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator, check_operands

SCHEMA = "pair_dots(Tensor A, Tensor B, Tensor A_meta, Tensor B_meta, *, str? impl=None) -> Tensor"


def check(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> None:
    letters = {"A": "nti", "B": "nto", "A_meta": "si", "B_meta": "so"}
    check_operands("pair_dots", letters, (A, B, A_meta, B_meta))


def fake(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    return A.new_empty(A.shape[0], dtype=accumulator(A.dtype))


def flops(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> int:
    n, t, i = A.shape
    o = B.shape[2]
    return 2 * n * t * A_meta.shape[0] * (i + o + 1)


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    sizes = ((2, 3, 4), (2, 3, 5), (6, 4), (6, 5))
    return tuple(torch.ones(size, device=device) for size in sizes)
