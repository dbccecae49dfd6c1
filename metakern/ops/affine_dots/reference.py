"""affine_dots in plain PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator


def affine_dots(
    X: Tensor, B: Tensor, V: Tensor, v: Tensor | None = None, eps: float = 1e-5, centred: bool = True
) -> Tensor:
    dtype = accumulator(X.dtype)
    X, B = X.to(dtype), B.to(dtype)
    distance = X - X.mean(2, keepdim=True) if centred else X
    normalised = distance * torch.rsqrt(distance.square().mean(2, keepdim=True) + eps)
    response = normalised * V.to(dtype)
    if v is not None:
        response = response + v.to(dtype)
    return (response * B).sum((1, 2))
