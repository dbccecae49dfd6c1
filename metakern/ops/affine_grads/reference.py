"""affine_grads in plain PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops.operands import accumulator


def affine_grads(
    X: Tensor, B: Tensor, eps: float = 1e-5, centred: bool = True, shift: bool = True
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(X.dtype)
    X, B = X.to(dtype), B.to(dtype)
    distance = X - X.mean(2, keepdim=True) if centred else X
    normalised = distance * (distance.square().mean(2, keepdim=True) + eps).rsqrt()
    return (normalised * B).sum(1), B.sum(1) if shift else B.new_empty(len(B), 0)
