"""affine_dots: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator, check_operands

SCHEMA = (
    "affine_dots(Tensor X, Tensor B, Tensor V, Tensor? v=None, float eps=1e-5, bool centred=True, *, "
    "str? impl=None) -> Tensor"
)


def check(X: Tensor, B: Tensor, V: Tensor, v: Tensor | None = None, eps: float = 1e-5, centred: bool = True) -> None:
    letters, tensors = {"X": "nti", "B": "nti", "V": "i"}, (X, B, V)
    if v is not None:
        letters, tensors = {**letters, "v": "i"}, (*tensors, v)
    check_operands("affine_dots", letters, tensors)
    if not eps >= 0:
        raise ValueError(f"affine_dots: eps must not be negative; got {eps}")


def fake(X: Tensor, B: Tensor, V: Tensor, v: Tensor | None = None, eps: float = 1e-5, centred: bool = True) -> Tensor:
    return X.new_empty(X.shape[0], dtype=accumulator(X.dtype))


def flops(X: Tensor, B: Tensor, V: Tensor, v: Tensor | None = None, eps: float = 1e-5, centred: bool = True) -> int:
    return X.shape[0] * X.shape[1] * X.shape[2] * (7 if v is None else 9)


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    X = torch.arange(24.0, device=device).view(2, 3, 4)
    return X, torch.ones_like(X), torch.ones(4, device=device), torch.ones(4, device=device)
