"""clip_normalise in plain PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops.operands import accumulator


def clip_normalise(dots: Tensor) -> Tensor:
    clipped = dots.to(accumulator(dots.dtype)).clamp_min(0)
    total = clipped.sum()
    return (clipped / (total + (total == 0))).to(dots.dtype)
