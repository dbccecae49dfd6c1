"""The step of all methods whose weights and losses are formulas: one pass, nothing is differentiated twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.methods.method import Batch, Outcome, Setting, Step

Rule = Callable[[Tensor, Tensor, Setting], Tensor]  # losses[n], targets[n], setting -> weights[n]
Criterion = Callable[[Tensor, Tensor, Setting], Tensor]  # logits[n, C], targets[n], setting -> losses[n]


def uniform_weights(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """w_n = 1 / n."""
    return losses.new_full((len(losses),), 1 / len(losses))


def cross_entropy(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """l_n = -log softmax(z_n)[y_n]."""
    return F.cross_entropy(logits, targets, reduction="none")


def step_on(
    losses: Tensor, optimizer: torch.optim.Optimizer, weights: Tensor | None = None, meta_loss: Tensor | None = None
) -> Outcome:
    """A step on the gradient of sum_n w_n l_n, weights[n] as constants; without them, w_n = 1 / n."""
    weights = (torch.full_like(losses, 1 / len(losses)) if weights is None else weights).detach()
    optimizer.zero_grad(set_to_none=True)
    (weights * losses).sum().backward()
    optimizer.step()
    return Outcome(weights, losses.detach(), meta_loss)


def weighted_step(rule: Rule = uniform_weights, criterion: Criterion = cross_entropy) -> Step:
    """A step on the gradient of sum_n w_n l_n, w = rule(l, y) treated as constant, l = criterion(z, y)."""

    def step(
        model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        inputs, targets = batch
        losses = criterion(model(inputs), targets, setting)
        return step_on(losses, optimizer, rule(losses.detach(), targets, setting))

    return step
