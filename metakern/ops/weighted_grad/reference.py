"""weighted_grad in plain PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator


def weighted_grad(
    A: Tensor, B: Tensor, w: Tensor, bias: bool = False, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(A.dtype)
    kept = w.nonzero().squeeze(1)  # a row of weight zero contributes nothing, not 0 * inf = nan
    scaled = (B[kept].to(dtype) * w[kept].to(dtype).view(-1, 1, 1)).flatten(0, 1)
    shift = scaled.sum(0) if bias else scaled.new_empty(0)
    matrix = torch.mm(scaled.t(), A[kept].to(dtype).flatten(0, 1))
    return (matrix if start is None else matrix.add_(start)).to(A.dtype), shift.to(A.dtype)
