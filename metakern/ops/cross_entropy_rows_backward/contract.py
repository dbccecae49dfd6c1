"""cross_entropy_rows_backward: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.cross_entropy_rows.contract import check_rows
from metakern.ops.operands import accumulator

SCHEMA = (
    "cross_entropy_rows_backward(Tensor logits, Tensor targets, Tensor highs, Tensor sums, Tensor grad, "
    "int ignore_index=-100, float label_smoothing=0.0, *, str? impl=None) -> Tensor"
)


def check(
    logits: Tensor,
    targets: Tensor,
    highs: Tensor,
    sums: Tensor,
    grad: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> None:
    operator = "cross_entropy_rows_backward"
    check_rows(operator, logits, targets, label_smoothing)
    dtype = accumulator(logits.dtype)
    for name, tensor in (("highs", highs), ("sums", sums), ("grad", grad)):
        if tensor.dtype != dtype:
            raise TypeError(f"{operator}: {name} must be {dtype} for logits of {logits.dtype}; got {tensor.dtype}")
        if tensor.shape != logits.shape[:1]:
            raise ValueError(f"{operator}: {name} must have shape [r] = [{len(logits)}]; got {list(tensor.shape)}")
        if tensor.device != logits.device:
            raise ValueError(f"{operator}: {name} must be on {logits.device} like logits; got {tensor.device}")


def fake(
    logits: Tensor,
    targets: Tensor,
    highs: Tensor,
    sums: Tensor,
    grad: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    return logits.new_empty(logits.shape)


def flops(logits: Tensor, *_: object) -> int:
    return 4 * logits.numel()


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    ones = torch.ones(2, device=device)
    return torch.ones(2, 3, device=device), torch.zeros(2, dtype=torch.int64, device=device), ones, 3 * ones, ones
