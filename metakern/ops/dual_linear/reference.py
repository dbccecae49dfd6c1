"""dual_linear in plain PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator


def dual_linear(A: Tensor, dA: Tensor, W: Tensor, dW: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulator(A.dtype)
    a, da, w, dw = (tensor.to(dtype) for tensor in (A, dA, W, dW))
    value = torch.mm(a, w.t())
    tangent = torch.mm(da, w.t()).addmm_(a, dw.t())
    return value.to(A.dtype), tangent.to(A.dtype)
