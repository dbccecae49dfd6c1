"""direction_dots in one expression of PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator


def direction_dots(A: Tensor, V: Tensor, B: Tensor) -> Tensor:
    dtype = accumulator(B.dtype)
    return torch.einsum("nti,oi,nto->n", A.to(dtype), V.to(dtype), B.to(dtype))
