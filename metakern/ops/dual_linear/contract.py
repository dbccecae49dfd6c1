"""dual_linear: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import check_operands

SCHEMA = "dual_linear(Tensor A, Tensor dA, Tensor W, Tensor dW, *, str? impl=None) -> (Tensor, Tensor)"


def check(A: Tensor, dA: Tensor, W: Tensor, dW: Tensor) -> None:
    check_operands("dual_linear", {"A": "ri", "dA": "ri", "W": "oi", "dW": "oi"}, (A, dA, W, dW))


def fake(A: Tensor, dA: Tensor, W: Tensor, dW: Tensor) -> tuple[Tensor, Tensor]:
    shape = (A.shape[0], W.shape[0])
    return A.new_empty(shape), A.new_empty(shape)


def flops(A: Tensor, dA: Tensor, W: Tensor, dW: Tensor) -> int:
    return 6 * A.shape[0] * A.shape[1] * W.shape[0]


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    return tuple(torch.ones(rows, 4, device=device) for rows in (3, 3, 5, 5))
