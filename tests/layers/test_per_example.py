"""Gradients of single examples in place of A and B: the same answers, and A and B are let go."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.engines import pose
from metakern.engines.recorded import Recorded
from metakern.layers import per_example
from metakern.testing import budget, inputs
from metakern.testing.catalogue import CASES, Case

LINEAR = """linear-positions linear-four-dimensions linear-many-positions attention attention-no-bias reused-four-times
tied-head""".split()
FOLDED = [case for case in CASES if ("conv" in case.name or case.name in LINEAR) and case.ghost == "exact"]
NOT_FOLDED = {  # one input channel a group, rows that stand alone
    "conv2d-depthwise", "conv3d-groups-dilation",
    "conv1d-transposed-weight", "conv1d-transposed-weight-positions", "reused-four-times",
    "attention", "attention-no-bias",
}  # fmt: skip


def pass_of(case: Case, params: Any = None) -> tuple[Recorded, dict[int, Tensor]]:
    """A recorded pass and a direction."""
    setup = case.make(5, 3)
    problem = pose(setup.model, setup.batch, setup.meta_batch, setup.loss_fn, params, "reuse")
    direction = {id(p): inputs.normal(p.numel(), seed=k).view_as(p) for k, p in enumerate(problem.chosen.values())}
    return Recorded(problem), direction


def count(train: Recorded) -> int:
    return sum(record is not None and isinstance(record.call.func, per_example.Folded) for record in train.records)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_example, "LARGEST_SHARE", 1e9)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", FOLDED, ids=lambda case: case.name)
def test_same_answers(case: Case, always: None) -> None:
    train, direction = pass_of(case)
    weights = torch.tensor([0.5, 0.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    dots, gradient = train.dots_along(direction), train.weighted_gradient(weights, keep=True)
    normalisations = count(train)
    train.fold(train._problem.chosen)
    assert count(train) == normalisations if case.name in NOT_FOLDED else count(train) > normalisations
    for again in range(2):
        budget.assert_within(train.dots_along(direction), dots, 100.0)
        for name, found in train.weighted_gradient(weights, keep=again == 0).items():
            budget.assert_within(found, gradient[name], 100.0, name=name)


class Twice(nn.Module):
    """One layer at every position and at their mean: with and without gradients of single examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)).mean(1))))


def test_weights_of_which_one_use_is_folded(always: None) -> None:
    torch.manual_seed(0)
    batch, meta_batch = inputs.pair(5, 3, 6, 4, classes=3)
    train = Recorded(pose(Twice().double(), batch, meta_batch, None, None, "reuse"))
    weights = inputs.normal(5, seed=1)
    want = train.weighted_gradient(weights, keep=True)
    train.fold(train._problem.chosen)
    assert count(train) == 1
    for name, found in train.weighted_gradient(weights).items():
        budget.assert_within(found, want[name], 100.0, name=name)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(48, 3)
    return nn.Sequential(*layers).double()


def opened(params: Any = None) -> Recorded:
    batch, meta_batch = inputs.pair(5, 3, 2, 6, 6, classes=3)
    return Recorded(pose(convolutions(), batch, meta_batch, None, params, "reuse"))


def test_activations_are_let_go() -> None:
    train = opened()
    (second,) = (record for record in train.records[1:2] if record is not None)
    held = [weakref.ref(second.call.argument(0, "input")), weakref.ref(second.output_grad)]
    del second
    train.fold(train._problem.chosen)
    gc.collect()
    assert count(train) == 2
    assert [ref() for ref in held] == [None, None]


def test_normalisations_let_go_as_the_pass_comes_by() -> None:
    """What the second one reads and its B are gone before the pass has come down to the first layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 3)).double()
    held, seen = list[weakref.ref[Tensor]](), list[bool]()

    def watch(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        held.append(weakref.ref(given[0]))
        output.grad_fn.register_prehook(lambda grads: held.append(weakref.ref(grads[0])))

    def look(module: nn.Module, given: Any, output: Tensor) -> None:
        output.grad_fn.register_prehook(lambda grads: seen.append(all(ref() is None for ref in held)))

    batch, meta_batch = inputs.pair(5, 3, 2, 6, 6, classes=3)
    problem = pose(model, batch, meta_batch, None, None, "reuse")
    metakern.l2rw_step(model, batch, meta_batch)  # the proofs of the first step keep the graph of its pass
    layers[4].register_forward_hook(watch)
    layers[1].register_forward_hook(look)
    train = Recorded(problem)
    assert count(train) == 2
    assert len(held) == 2
    assert seen == [True]


def test_large_kernels_and_other_parameters_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    train = opened(params=["2"])
    train.fold(train._problem.chosen)
    assert count(train) == 1
    monkeypatch.setattr(per_example, "LARGEST_SHARE", 0.1)
    train = opened()
    train.fold(train._problem.chosen)
    assert count(train) == 0


@pytest.mark.parametrize("params", [["0.weight"], ["0.bias", "2.weight"], ["2", "4.weight"]])
def test_some_parameters(params: list[str]) -> None:
    """What only some of a layer's parameters ask for, and then all of them."""
    plain, train = opened(params), opened(params)
    train.fold(train._problem.chosen)
    weights = inputs.normal(5, seed=1)
    for only in (train._problem.chosen, None):
        names = {} if only is None else only
        wanted = {name: plain._problem.trainable[name] for name in names} or None
        found = train.weighted_gradient(weights, keep=only is not None, only=only)
        for name, want in plain.weighted_gradient(weights, keep=True, only=wanted).items():
            budget.assert_within(found[name], want, 100.0, name=name)


def test_examples_of_weight_zero_may_hold_anything() -> None:
    gradients = {1: torch.tensor([[1.0, 2.0], [torch.inf, torch.nan], [3.0, 5.0]])}
    weights = torch.tensor([1.0, 0.0, 2.0])
    found = per_example.weighted(gradients, per_example.Weights(weights, weights.nonzero().squeeze(1)))
    assert found[1].tolist() == [7.0, 12.0]


def test_pairwise_dots_of_convolutions() -> None:
    """The meta batch is folded as well, and every direction is one of its rows."""
    batch, meta_batch = inputs.pair(5, 3, 2, 6, 6, classes=3)
    found = metakern.grad_dots(convolutions(), batch, meta_batch, pairwise=True).dots
    for j in range(3):
        one = metakern.grad_dots(convolutions(), batch, tuple(part[j : j + 1] for part in meta_batch)).dots
        budget.assert_within(found[:, j], one, 100.0)
