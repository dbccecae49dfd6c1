"""Checkpointed layers run again in a backward pass, with the parameters and functions that the graph was made with."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metakern
from metakern.engines import implicit
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

ENGINES = pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
BATCHES = inputs.pair(5, 3, 4, classes=3)


class Held(nn.Module):
    """Its second layer reads weight and bias from a list."""

    def __init__(self, checkpointed: bool, listed: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.double()
        self.listed = [self.second.weight, self.second.bias] if listed else None
        self.checkpointed = checkpointed

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(x) if self.listed is None else F.linear(x, *self.listed))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.third(
            checkpoint(self.block, hidden, use_reentrant=False) if self.checkpointed else self.block(hidden)
        )


def weight_net_step(model: nn.Module, **settings: Any) -> Tensor:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()
    dots = metakern.mwnet_step(model, net, *BATCHES, weight_optimizer=None, virtual_lr=1.0, **settings).dots
    assert dots is not None
    return dots


@ENGINES
def test_virtual_steps_of_parameters_held_elsewhere(engine: str) -> None:
    found, want = (weight_net_step(Held(checkpointed), engine=engine) for checkpointed in (True, False))
    budget.assert_within(found, want, 10.0)


def test_virtual_steps_that_are_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implicit, "implicit_is_cheaper", lambda *sizes: True)
    found, want = (weight_net_step(Held(checkpointed, listed=False), engine="ghost") for checkpointed in (True, False))
    budget.assert_within(found, want, 10.0)


def test_inner_steps_of_parameters_held_elsewhere() -> None:
    models = Held(True), Held(False)
    for model in models:
        metakern.metabalance_step(model, *BATCHES, inner_lr=1.0)
    for found, want in zip(*(model.parameters() for model in models), strict=True):
        budget.assert_within(found.grad, want.grad, 10.0)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.EmbeddingBag(7, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(checkpoint(lambda tokens: torch.tanh(self.table(tokens)), tokens, use_reentrant=False))


@ENGINES
def test_bags(engine: str) -> None:
    batch, meta_batch = (
        (inputs.labels(n, 3, classes=7, seed=n), inputs.labels(n, classes=3, seed=n + 1)) for n in (5, 3)
    )
    judge_step(metakern.l2rw_step, Setup(Bags(), batch, meta_batch), engine=engine)
