"""Losses along the features of a layer, as of several tasks of one input: rows are of all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

TASKS = 6


def by_feature(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean(0)


class Repeated(nn.Module):
    """A normalisation whose channels are those of all examples, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 2).double())

    def forward(self, x: Tensor) -> Tensor:
        channels = x.transpose(0, 1).reshape(1, TASKS * 2, -1)
        found = F.group_norm(channels, TASKS, self.weight.repeat(TASKS))
        return found.view(TASKS, -1).t().tanh()


MODELS = {
    "linear": lambda: nn.Linear(5, TASKS),
    "embedding": lambda: nn.Embedding(7, TASKS),
    "layer_norm": lambda: nn.LayerNorm(TASKS),
    "repeated": Repeated,
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_serves(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    batch = torch.randint(7, (4,)) if name == "embedding" else torch.randn(4, 5 if name == "linear" else TASKS).double()
    setup = Setup(model, batch, batch, loss_fn=by_feature, interacting=True)
    assert judge_step(metakern.l2rw_step, setup).result.engine == "jvp"
    with pytest.raises(NotImplementedError, match=r"examples lie along the features|examples interact"):
        metakern.l2rw_step(model, batch, batch, loss_fn=by_feature, engine="ghost")
