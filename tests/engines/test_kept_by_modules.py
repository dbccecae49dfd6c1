"""What modules keep between calls, in objects and collections of any kind, counts once for either batch."""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.judge import Snapshot


class Network(nn.Module):
    """`scale()` looks at what it keeps, and moves it on; with a batch normalisation only forward mode serves it."""

    calls_of_the_class = 0

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6) if normalised else nn.Identity()
        self.double()
        self.begin()

    def begin(self) -> None:
        raise NotImplementedError

    def scale(self) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x * self.scale()))))


class Meter:
    def __init__(self) -> None:
        self.calls, self.seen = 0, list[int]()


class WithMeter(Network):
    def begin(self) -> None:
        self.meter = Meter()

    def scale(self) -> float:
        self.meter.calls += 1
        self.meter.seen.append(1)
        return 1 + 0.1 * self.meter.calls + len(self.meter.seen)


class Nested(Network):
    def begin(self) -> None:
        self.held = {"inner": [{"calls": 0}], "counts": collections.Counter()}

    def scale(self) -> float:
        self.held["inner"][0]["calls"] += 1
        self.held["counts"]["calls"] += 1
        return 1 + 0.1 * self.held["inner"][0]["calls"] + self.held["counts"]["calls"]


class Generators(Network):
    def begin(self) -> None:
        self.held = {"torch": torch.Generator().manual_seed(0), "numpy": [np.random.default_rng(0)]}
        self.older = np.random.RandomState(0)

    def scale(self) -> float:
        drawn = torch.rand((), generator=self.held["torch"]).item()
        return 1 + drawn + self.held["numpy"][0].random() + self.older.rand()


class Arrays(Network):
    def begin(self) -> None:
        self.array, self.tensors = np.zeros(2), [torch.zeros(2)]

    def scale(self) -> float:
        self.array += 1
        self.tensors[0].add_(1)
        return 1 + 0.1 * float(self.array[0]) + 0.2 * self.tensors[0][0].item()


class OfTheClass(Network):
    def begin(self) -> None:
        type(self).calls_of_the_class = 0

    def scale(self) -> float:
        type(self).calls_of_the_class += 1
        return 1 + 0.1 * self.calls_of_the_class


class LateBuffer(Network):
    def begin(self) -> None:
        pass

    def scale(self) -> Tensor:
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones((), dtype=torch.float64))
        self.late.mul_(0.9)
        return self.late.clone()


class Flag(Network):
    def begin(self) -> None:
        self.flag = nn.Identity()

    def scale(self) -> float:
        self.flag.train(not self.flag.training)
        return 2.0 if self.flag.training else 1.0


KINDS = (WithMeter, Nested, Generators, Arrays, OfTheClass, LateBuffer, Flag)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_once(kind: Callable[[bool], Network], normalised: bool) -> None:
    """Three steps give what an engine gives that runs either batch a single time, and leave what it leaves."""
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    found = []
    for engine in ("double_backward", "auto"):
        model = kind(normalised)
        dots = [metakern.l2rw_step(model, batch, meta_batch, engine=engine).dots for _ in range(3)]
        found.append(torch.stack([*dots, torch.full((5,), float(model.scale()))]))
    budget.assert_within(found[1], found[0], 10.0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_a_failed_step(kind: Callable[[bool], Network]) -> None:
    model = kind(True)
    before = Snapshot.of(model)
    with pytest.raises(NotImplementedError, match="examples interact"):
        metakern.l2rw_step(model, *inputs.pair(5, 3, 4, classes=3), engine="ghost")
    before.assert_unchanged(model)
    found = torch.as_tensor(model.scale())
    budget.assert_within(found, torch.as_tensor(kind(True).scale()), 1.0)
