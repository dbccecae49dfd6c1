"""row_dots in plain PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator


def row_dots(X: Tensor, Y: Tensor) -> Tensor:
    dtype = accumulator(X.dtype)
    return torch.linalg.vecdot(X.to(dtype), Y.to(dtype))
