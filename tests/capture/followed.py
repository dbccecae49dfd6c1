"""Steps of one model on one batch after the other, where what comes with a batch says how rows are treated."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

N, WIDTH = 6, 8
IN_ORDER, MIXED = [0, 1, 2, 3, 4, 5], [3, 1, 0, 2, 5, 4]

Losses = Callable[[Tensor, nn.Module, Tensor, Any], Tensor]
"""Hidden rows, head, labels and what came with the batch -> losses."""


def between(function: Callable[[Tensor, Any], Tensor]) -> Losses:
    """Something that happens to the hidden rows before the head."""
    return lambda h, head, y, how: F.cross_entropy(head(function(h, how)), y, reduction="none")


def beside(function: Callable[[Tensor, Any], Tensor]) -> Losses:
    """A term [n] of the hidden rows that is added to the losses."""
    return lambda h, head, y, how: F.cross_entropy(head(h), y, reduction="none") + function(h, how)


def follow(losses: Losses, hows: Sequence[Any], module: nn.Module | None = None, **keywords: Any) -> list[str]:
    """The engine of each step, "refused" where there is none; what was served is judged."""
    torch.manual_seed(0)
    layers = {"first": nn.Linear(5, WIDTH), "head": nn.Linear(WIDTH, 4)}
    model = nn.ModuleDict(layers if module is None else {**layers, "between": module}).double()

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor, Any]) -> Tensor:
        hidden = torch.tanh(model["first"](batch[0]))
        return losses(hidden if module is None else model["between"](hidden, batch[2]), model["head"], *batch[1:])

    engines = []
    for seed, how in enumerate(hows):
        batch, meta_batch = (
            (inputs.normal(N, 5, seed=k), inputs.labels(N, classes=4, seed=k), how) for k in (seed, 99)
        )
        try:
            judged = judge_step(
                metakern.l2rw_step, Setup(model, batch, meta_batch, loss_fn, interacting=True), **keywords
            )
            engines.append(judged.result.engine)
        except NotImplementedError:
            engines.append("refused")
        model.zero_grad()
    return engines
