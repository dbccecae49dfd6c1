"""Inner products of two tensors of one shape, one per example."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern import ops
from metakern.capture.independence.examples import ExampleAxis
from metakern.ops.row_dots.api import small


def per_example_inner(left: Tensor, right: Tensor, axis: ExampleAxis, examples: int) -> Tensor:
    """<left_n, right_n> over everything but the examples, [n]; accumulated in float32 or better."""
    if axis.leading:
        left, right = left.reshape(examples, -1, *left.shape[1:]), right.reshape(examples, -1, *right.shape[1:])
        left, right = _flattened(left, right)
        return torch.linalg.vecdot(left, right) if small(left) else ops.row_dots(left, right)
    if left.dtype in (torch.float16, torch.bfloat16):
        left, right = left.float(), right.float()
    return axis.total(left * right, examples)


def _flattened(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [n, everything else] without a copy where they share a memory order."""
    if not left.is_contiguous() and left.stride() == right.stride():
        order = sorted(range(1, left.dim()), key=lambda d: -left.stride(d))
        left, right = left.permute(0, *order), right.permute(0, *order)
    return left.flatten(1), right.flatten(1)
