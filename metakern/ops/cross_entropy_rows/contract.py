"""cross_entropy_rows: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator, check_operands

SCHEMA = (
    "cross_entropy_rows(Tensor logits, Tensor targets, int ignore_index=-100, float label_smoothing=0.0, *, "
    "str? impl=None) -> (Tensor, Tensor)"
)


def check(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
    check_operands("cross_entropy_rows", {"logits": "rC"}, (logits,))
    if targets.dtype != torch.int64:
        raise TypeError(f"cross_entropy_rows: targets must be int64; got {targets.dtype}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy_rows: targets must have shape [r] = [{logits.shape[0]}]; got {list(targets.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(f"cross_entropy_rows: targets must be on {logits.device} like logits; got {targets.device}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy_rows: label_smoothing must be in [0, 1]; got {label_smoothing}")


def fake(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=accumulator(logits.dtype))
    return losses, logits.new_empty(logits.shape)


def flops(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0) -> int:
    return 6 * logits.shape[0] * logits.shape[1]


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    return torch.zeros(2, 3, device=device), torch.zeros(2, dtype=torch.int64, device=device)
