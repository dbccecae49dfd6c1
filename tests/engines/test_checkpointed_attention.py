"""Checkpointed layers run again in a backward pass, in the form of attention that the graph was made with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metakern
from metakern.step import LabelNet
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step


class Attending(nn.Module):
    """Attention that is run again for its gradient, beneath a batch normalisation."""

    def __init__(self, checkpointed: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.given, self.norm, self.last = nn.Linear(4, 12), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.checkpointed, self.dropout = checkpointed, dropout
        self.double()

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = self.given(x).view(-1, 2, 3, 2).unbind(2)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        attended = checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x)
        return self.last(self.norm(attended))  # type: ignore[arg-type]


BATCHES = inputs.pair(6, 4, 4, classes=3)
ENGINES = pytest.mark.parametrize("engine", ["jvp", "double_backward"])


@ENGINES
def test_whole_steps_are_exact(engine: str) -> None:
    judge_step(metakern.l2rw_step, Setup(Attending(), *BATCHES, interacting=True), engine=engine)


def require_alike(step: Callable[[nn.Module], Any], dropout: float = 0.0) -> None:
    """The same step with and without checkpointing, with the same masks of attention."""
    grads = []
    for checkpointed in (True, False):
        model = Attending(checkpointed, dropout)
        torch.manual_seed(1)
        step(model)
        grads.append([p.grad for p in model.parameters()])
    for found, want in zip(*grads, strict=True):
        budget.assert_within(found, want, 1.0, terms=100)


@ENGINES
def test_masks_are_drawn_alike(engine: str) -> None:
    require_alike(lambda model: metakern.l2rw_step(model, *BATCHES, engine=engine), dropout=0.5)


@ENGINES
def test_steps_of_a_weight_net(engine: str) -> None:
    def step(model: nn.Module) -> None:
        net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()
        metakern.mwnet_step(model, net, *BATCHES, weight_optimizer=None, virtual_lr=0.1, engine=engine)

    require_alike(step)


def test_steps_of_metabalance() -> None:
    require_alike(lambda model: metakern.metabalance_step(model, *BATCHES, inner_lr=0.1))


def test_steps_of_label_correction() -> None:
    def step(model: nn.Module) -> None:
        settings: dict[str, Any] = dict(label_optimizer=None, virtual_lr=0.1, clean_batch=BATCHES[1])
        metakern.mlc_step(model, LabelNet(3).double(), *BATCHES, **settings)

    require_alike(step)
