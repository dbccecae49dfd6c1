"""row_dots: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator, check_operands

SCHEMA = "row_dots(Tensor X, Tensor Y, *, str? impl=None) -> Tensor"


def check(X: Tensor, Y: Tensor) -> None:
    check_operands("row_dots", {"X": "nk", "Y": "nk"}, (X, Y))


def fake(X: Tensor, Y: Tensor) -> Tensor:
    return X.new_empty(X.shape[0], dtype=accumulator(X.dtype))


def flops(X: Tensor, Y: Tensor) -> int:
    return 2 * X.shape[0] * X.shape[1]


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    return torch.ones(2, 3, device=device), torch.ones(2, 3, device=device)
