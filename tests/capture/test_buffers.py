"""Buffers of any kind: what a pass that does not count writes into them is undone, and none is in the way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

ENGINES = ["ghost", "jvp", "double_backward"]


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().flatten(1).mean(1)


class Scaled(nn.Module):
    """A linear layer and a buffer as a factor, which may change in every pass."""

    def __init__(self, factor: Tensor, change: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(5, 4).double(), change
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        if self.change is not None:
            self.change(self.factor)
        return self.linear(x) * self.factor


def some(n: int, seed: int) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setup_of(model: nn.Module, batch: Tensor | None = None) -> Setup:
    rows = lambda batch, k: batch[k : k + 1]  # noqa: E731
    return Setup(model, some(6, 1) if batch is None else batch, some(3, 2), loss_fn=losses, select=rows)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_expanded_ones(engine: str, train: bool) -> None:
    """torch refuses to write into them."""
    factor = torch.full((1,), 2.0, dtype=torch.float64).expand(4)
    model = Scaled(factor).train(train)
    for each in (model, copy.deepcopy(model)):  # of which the second is no view
        judge_step(metakern.l2rw_step, setup_of(each), engine=engine)


class Added(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.factor


@pytest.mark.parametrize("engine", ENGINES)
def test_inference_tensors(engine: str) -> None:
    """As far as torch itself takes them: where autograd saves none."""
    with torch.inference_mode():
        shift = torch.full((4,), 2.0, dtype=torch.float64)
    judge_step(metakern.l2rw_step, setup_of(Added(shift)), engine=engine)


class Shifted(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.linear.bias.sum())


def test_a_batch_of_inference_tensors() -> None:
    """What another model made of the inputs; autograd saves none of them here."""
    with torch.inference_mode():
        batch = some(6, 1)
    model = Shifted(torch.ones(4, dtype=torch.float64))
    expected = metakern.grad_dots(model, some(6, 1), some(3, 2), loss_fn=losses)
    found = metakern.grad_dots(model, batch, some(3, 2), loss_fn=losses)
    assert found.engine == expected.engine == "ghost"
    assert torch.equal(found.dots, expected.dots)


@pytest.mark.parametrize("engine", ENGINES)
def test_writes_past_the_version_counter_count_once_a_step(engine: str) -> None:
    """In evaluation mode as well, and not at all where nothing is to change."""

    def change(factor: Tensor) -> None:
        factor.data.add_(1)

    model = Scaled(torch.zeros(4, dtype=torch.float64), change).eval()
    metakern.grad_dots(model, some(6, 1), some(3, 2), loss_fn=losses, engine=engine)
    assert model.factor.tolist() == [0.0] * 4
    metakern.l2rw_step(model, some(6, 1), some(3, 2), loss_fn=losses, engine=engine)
    assert model.factor.tolist() == [1.0] * 4


def test_a_failed_step_takes_them_back() -> None:
    def change(factor: Tensor) -> None:
        factor.data.add_(1)

    def failing(model: nn.Module, batch: Tensor) -> Tensor:
        found = losses(model, batch)
        return found.log() if len(batch) == 6 else found * torch.nan

    model = Scaled(torch.ones(4, dtype=torch.float64), change).eval()
    with pytest.raises(ValueError, match="not finite"):
        metakern.l2rw_step(model, some(6, 1), some(3, 2), loss_fn=failing)
    assert model.factor.tolist() == [1.0] * 4


def test_one_number_of_one_example() -> None:
    """A parameter times a number without dimensions."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.temperature = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x).square().mean() * self.temperature).unsqueeze(0)

    (x, _), (mx, _) = inputs.pair(1, 1, 4, classes=3)
    setup = Setup(Mean().double(), x, mx, loss_fn=lambda model, batch: model(batch), select=lambda batch, k: batch)
    judge_step(metakern.l2rw_step, setup, engine="ghost")
