"""cross_entropy_rows_backward in plain PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops.operands import accumulator


def cross_entropy_rows_backward(
    logits: Tensor,
    targets: Tensor,
    highs: Tensor,
    sums: Tensor,
    grad: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    ignored = (targets == ignore_index).unsqueeze(1)
    shares = (logits.to(accumulator(logits.dtype)) - highs.unsqueeze(1)).exp_() / sums.unsqueeze(1)
    shares -= label_smoothing / logits.shape[1]
    hits = targets.unsqueeze(1).masked_fill(ignored, 0)
    shares.scatter_add_(1, hits, shares.new_full((1, 1), label_smoothing - 1).expand_as(hits))
    return (shares * grad.unsqueeze(1)).masked_fill_(ignored, 0).to(logits.dtype)
