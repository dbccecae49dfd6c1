"""cross_entropy_rows in plain PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from metakern.ops.operands import accumulator


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.to(accumulator(logits.dtype))
    highs = z.amax(1)
    losses = F.cross_entropy(z, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    return losses, highs, (z - highs.unsqueeze(1)).exp_().sum(1)
