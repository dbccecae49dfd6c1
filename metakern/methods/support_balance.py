"""What a few-shot learner does about an unbalanced support set: over-sampling, or another loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.data import Examples
from metakern.methods.class_weights import by_class, effective_number, inverse_frequency
from metakern.methods.focal import focal_loss

# logits[n, K], targets[n], shots[K] -> the mean loss []
BalancedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
BETA, GAMMA = 0.9, 2.0


class Balance(NamedTuple):
    """The loss, given the `shots` of the support set, and whether that set is over-sampled first."""

    loss: BalancedLoss
    fills_up: bool = False


def oversampled(support: Examples, generator: torch.Generator) -> Examples:
    """Every class over-sampled to the size of the largest: its own examples, and copies drawn with replacement."""
    counts = torch.bincount(support.targets)
    rows = []
    for target, count in enumerate(counts.tolist()):
        if count:
            own = (support.targets == target).nonzero().squeeze(1)
            extra = torch.randint(count, (int(counts.max()) - count,), generator=generator)
            rows += [own, own[extra]]
    return support.take(torch.cat(rows))


def _plain(logits: Tensor, targets: Tensor, shots: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def _weighted(logits: Tensor, targets: Tensor, class_weights: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (by_class(class_weights.to(losses), targets) * losses).sum()


def _inverse(logits: Tensor, targets: Tensor, shots: Tensor) -> Tensor:
    return _weighted(logits, targets, inverse_frequency(shots))


def _class_balanced(logits: Tensor, targets: Tensor, shots: Tensor) -> Tensor:
    return _weighted(logits, targets, effective_number(shots, beta=BETA))


def _focal(logits: Tensor, targets: Tensor, shots: Tensor) -> Tensor:
    return focal_loss(logits, targets, gamma=GAMMA, detach=True).mean()


# Source: Ochal et al., "Few-Shot Learning with Class Imbalance", 2021, and the code published with it.
BALANCES: dict[str, Balance] = {
    "none": Balance(_plain),
    "over-sampling": Balance(_plain, fills_up=True),
    "weighted": Balance(_inverse),
    "class-balanced": Balance(_class_balanced),
    "focal": Balance(_focal),
}
