"""clip_normalise: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import check_operands

SCHEMA = "clip_normalise(Tensor dots, *, str? impl=None) -> Tensor"


def check(dots: Tensor) -> None:
    check_operands("clip_normalise", {"dots": "n"}, (dots,))


def fake(dots: Tensor) -> Tensor:
    return dots.new_empty(dots.shape)


def flops(dots: Tensor) -> int:
    return 3 * dots.shape[0]


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    return (torch.linspace(-1, 1, 5, device=device),)
