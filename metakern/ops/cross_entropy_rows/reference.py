"""cross_entropy_rows in plain PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from metakern.ops.operands import accumulator


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    wide = logits.to(accumulator(logits.dtype))
    losses = F.cross_entropy(
        wide, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    taken = (targets != ignore_index).unsqueeze(1)
    classes = targets.unsqueeze(1).where(taken, 0)
    grad = torch.softmax(wide, 1) - label_smoothing / max(1, logits.shape[1])
    if len(targets):
        grad.scatter_add_(1, classes, torch.full_like(classes, -1, dtype=wide.dtype) * (1 - label_smoothing))
    return losses, grad.where(taken, 0).to(logits.dtype)
