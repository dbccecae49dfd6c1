"""Learning to reweight examples (L2RW): the step's weights are how much each example helps a small clean set.

As a composition: grad dots -> clip and normalise -> weighted gradient -> step. All of it is `metakern.l2rw_step`.
"""

from __future__ import annotations

import torch
from torch import nn

import metakern
from metakern.methods.method import Batch, Method, Outcome, Setting, always


def step(
    model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
) -> Outcome:
    """w_n = max(<grad l_n, grad L_meta>, 0) / (sum + [sum == 0]), then a step on sum_n w_n l_n.

    Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, algorithm 1.
    """
    result = metakern.l2rw_step(model, batch, meta_batch, optimizer=optimizer, engine=setting.engine)
    return Outcome(result.weights, result.losses, result.meta_loss)


L2RW = Method(
    "l2rw",
    "weights by how much each example's gradient helps a small clean set",
    "Ren et al., ICML 2018",
    always(step),
    steps=4000,
    needs_meta=True,
    handles="both",
)
