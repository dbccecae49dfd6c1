"""A trainable parameter that comes into the model while a step runs has neither dots nor a gradient: refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, judge_step

ENGINES = pytest.mark.parametrize("engine", ["auto", "ghost", "jvp", "double_backward"])


class Growing(nn.Module):
    """Makes something when it is first called."""

    def __init__(self, grow: Callable[["Growing"], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
        self.grow, self.third, self.shift = grow, None, None

    def forward(self, x: Tensor) -> Tensor:
        self.grow(self)
        hidden = torch.tanh(self.first(x))
        hidden = hidden if self.third is None else self.third(hidden)
        return self.second(hidden if self.shift is None else hidden + self.shift)


def layer(model: Growing) -> None:
    model.third = model.third or nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()


def parameter(model: Growing) -> None:
    if model.shift is None:
        model.shift = nn.Parameter(torch.zeros(4).double())


def another(model: Growing) -> None:
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())


@ENGINES
@pytest.mark.parametrize(("grow", "name"), [(layer, "third.0.weight"), (parameter, "shift"), (another, "first.weight")])
def test_refused(grow: Callable[[Growing], None], name: str, engine: str) -> None:
    model, batches = Growing(grow), inputs.pair(5, 3, 4, classes=3)
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match=f"parameter '{name}' was registered while the step was running"):
        metakern.l2rw_step(model, *batches, engine=engine)
    before.assert_unchanged(model)


@ENGINES
@pytest.mark.parametrize("grow", [layer, parameter])
def test_served_once_it_is_there(grow: Callable[[Growing], None], engine: str) -> None:
    model, batches = Growing(grow), inputs.pair(5, 3, 4, classes=3)
    model(batches[0][0])
    judge_step(metakern.l2rw_step, Setup(model, *batches), engine=engine)


def of_no_account(model: Growing) -> None:
    """A module that is not the model's, one without anything to train, and one that is there already."""
    nn.Linear(4, 4)
    model.loss = nn.CrossEntropyLoss()
    model.second = model.second


@ENGINES
def test_other_registrations(engine: str) -> None:
    batches = inputs.pair(5, 3, 4, classes=3)
    truth = Setup(Growing(lambda model: None), *batches).oracle()
    budget.assert_dots(metakern.grad_dots(Growing(of_no_account), *batches, engine=engine).dots, truth)
