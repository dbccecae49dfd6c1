"""Learning to reweight examples (L2RW): an example's weight is how much it helps on a small clean set.

As a composition: grad dots -> rule, by default clip and normalise -> weighted gradient -> step. This is
`metakern.reweight_step`, with the defaults `metakern.l2rw_step`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import metakern
from metakern.data.sampling import class_balanced, shuffled
from metakern.methods.method import Batch, Method, Outcome, Setting, always
from metakern.methods.weight_net_step import virtual_rule
from metakern.step.direction import Direction, preconditioned, with_weight_decay
from metakern.weights import weight_rule


@dataclass(frozen=True)
class ReweightSettings:
    """Settings; the defaults are the paper's.

    rule: from dots to weights, a name that `metakern.reweight_step` knows. weight_decay: added to the meta loss, as in
    the code for CIFAR. preconditioned: the dots are taken along the update of the run's optimizer instead of the meta
    gradient. balanced_meta: with --meta-batch-size, the meta batch has equally many examples of each class.
    """

    rule: str = "clip_normalise"
    weight_decay: float = 0.0
    preconditioned: bool = False
    balanced_meta: bool = False

    def __post_init__(self) -> None:
        weight_rule(self.rule)
        if self.weight_decay and self.preconditioned:
            raise ValueError("weight_decay and preconditioned are two directions of the dots; give one of them")

    def direction(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Direction | None:
        """What the dots run along; None for the meta gradient."""
        if self.preconditioned:
            return preconditioned(model, optimizer, virtual_rule(optimizer))
        return with_weight_decay(model, self.weight_decay) if self.weight_decay else None


def l2rw(settings: ReweightSettings) -> Method:
    """L2RW with the given settings."""

    def step(
        model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        """w_n = max(<grad l_n, grad L_meta>, 0) / (sum + [sum == 0]), then a step on sum_n w_n l_n.

        Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, algorithm 1.
        """
        result = metakern.reweight_step(
            model,
            batch,
            meta_batch,
            rule=settings.rule,
            direction=settings.direction(model, optimizer),
            optimizer=optimizer,
            engine=setting.engine,
        )
        return Outcome(result.weights, result.losses, result.meta_loss)

    return Method(
        "l2rw",
        "weights by how much each example's gradient helps a small clean set",
        "Ren et al., ICML 2018",
        always(step),
        steps=4000,
        needs_meta=True,
        handles="both",
        meta_sampler=class_balanced if settings.balanced_meta else shuffled,
        settings=settings,
        rebuilt=l2rw,
    )


L2RW = l2rw(ReweightSettings())
