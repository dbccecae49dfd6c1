"""affine_grads: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator, check_operands

SCHEMA = (
    "affine_grads(Tensor X, Tensor B, float eps=1e-5, bool centred=True, bool shift=True, *, str? impl=None) "
    "-> (Tensor, Tensor)"
)


def check(X: Tensor, B: Tensor, eps: float = 1e-5, centred: bool = True, shift: bool = True) -> None:
    check_operands("affine_grads", {"X": "nti", "B": "nti"}, (X, B))
    if not eps >= 0:
        raise ValueError(f"affine_grads: eps must not be negative; got {eps}")


def fake(X: Tensor, B: Tensor, eps: float = 1e-5, centred: bool = True, shift: bool = True) -> tuple[Tensor, Tensor]:
    n, _, width = X.shape
    dtype = accumulator(X.dtype)
    return X.new_empty(n, width, dtype=dtype), X.new_empty(n, width if shift else 0, dtype=dtype)


def flops(X: Tensor, B: Tensor, eps: float = 1e-5, centred: bool = True, shift: bool = True) -> int:
    return X.shape[0] * X.shape[1] * X.shape[2] * (5 + 2 * centred + shift)


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    X = torch.arange(24.0, device=device).view(2, 3, 4)
    return X, torch.ones_like(X)
