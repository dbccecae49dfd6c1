"""pair_dots: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator, check_operands

SCHEMA = "pair_dots(Tensor A, Tensor B, Tensor A_meta, Tensor B_meta, *, str? impl=None) -> Tensor"


def check(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> None:
    check_operands("pair_dots", _EACH if A_meta.dim() == 3 else _SUMMED, (A, B, A_meta, B_meta))


_SUMMED = {"A": "nti", "B": "nto", "A_meta": "si", "B_meta": "so"}
_EACH = {"A": "nti", "B": "nto", "A_meta": "msi", "B_meta": "mso"}


def fake(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    return A.new_empty((A.shape[0], *A_meta.shape[:-2]), dtype=accumulator(A.dtype))


def flops(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> int:
    n, t, i = A.shape
    o = B.shape[2]
    return 2 * n * t * A_meta.shape[:-1].numel() * (i + o + 1)


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    sizes = ((2, 3, 4), (2, 3, 5), (6, 4), (6, 5))
    return tuple(torch.ones(size, device=device) for size in sizes)
