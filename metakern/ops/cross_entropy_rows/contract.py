"""cross_entropy_rows: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator, check_operands

SCHEMA = (
    "cross_entropy_rows(Tensor logits, Tensor targets, int ignore_index=-100, float label_smoothing=0.0, *, "
    "str? impl=None) -> (Tensor, Tensor, Tensor)"
)


def check(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
    check_rows("cross_entropy_rows", logits, targets, label_smoothing)


def check_rows(operator: str, logits: Tensor, targets: Tensor, label_smoothing: float) -> None:
    """The checks of logits, targets and smoothing, which the operator shares with its backward.

    Raises: TypeError for dtypes, ValueError for shapes, devices and the smoothing, naming the argument.
    """
    check_operands(operator, {"logits": "rC"}, (logits,))
    if logits.shape[1] == 0:
        raise ValueError(f"{operator}: logits must have one class at least; got {list(logits.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"{operator}: targets must be int64; got {targets.dtype}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"{operator}: targets must have shape [r] = [{len(logits)}]; got {list(targets.shape)}")
    if targets.device != logits.device:
        raise ValueError(f"{operator}: targets must be on {logits.device} like logits; got {targets.device}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{operator}: label_smoothing must be in [0, 1]; got {label_smoothing}")


def fake(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], accumulator(logits.dtype)
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype)


def flops(logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0) -> int:
    return 4 * logits.numel()


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    return torch.ones(2, 3, device=device), torch.zeros(2, dtype=torch.int64, device=device)
