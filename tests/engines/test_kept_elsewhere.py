"""What a loss function keeps between its calls, outside the model, counts once; no NaN of a proof stays in it."""

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs

Losses = Callable[[nn.Module, Any], Tensor]
Kept = tuple[Losses, Callable[[], Any]]
"""A loss function, and what it keeps, to compare."""


class Network(nn.Module):
    """With a batch normalisation only forward mode serves it."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6) if normalised else nn.Identity()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def entropies(logits: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(logits, batch[1], reduction="none")


def generator_in_a_closure() -> Kept:
    generator = torch.Generator()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=generator, dtype=batch[0].dtype)
        return entropies(model(batch[0] + noise), batch)

    return losses, lambda: generator.get_state().sum().item()


def generators_of_python_and_numpy() -> Kept:
    own, numpy = random.Random(0), np.random.default_rng(0)
    return lambda model, batch: entropies(model(batch[0] * own.random() + numpy.random()), batch), own.random


def memory_bank() -> Kept:
    bank = torch.zeros(5, 3, dtype=torch.float64)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        found = entropies(logits - bank.mean(0), batch)
        bank[1:] = bank[:-1].clone()
        bank[0] = logits.detach()[0]
        return found

    return losses, lambda: bank.sum().item()


def running_centre() -> Kept:
    kept: dict[str, Any] = {"centre": torch.zeros(3, dtype=torch.float64), "sizes": []}

    def losses(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        found = entropies(logits - kept["centre"], batch)
        kept["centre"] = 0.9 * kept["centre"] + 0.1 * logits.detach().mean(0)
        kept["sizes"].append(len(logits))
        return found

    return losses, lambda: (kept["centre"].sum().item(), len(kept["sizes"]))


class Criterion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))
        self.calls = 0

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        found = entropies(logits - self.centre, batch)
        self.centre.mul_(0.9).add_(logits.detach().mean(0), alpha=0.1)
        self.calls += 1
        return found


def module() -> Kept:
    criterion = Criterion()
    return criterion, lambda: (criterion.centre.sum().item(), criterion.calls)


def method_of_a_trainer() -> Kept:
    class Trainer:
        def __init__(self) -> None:
            self.criterion, self.scale, self.calls = Criterion(), 1.0, 0

        def losses(self, weight: float, model: nn.Module, batch: Any) -> Tensor:
            found = self.criterion(model, batch) * self.scale * weight
            self.scale, self.calls = 0.9 * self.scale + 0.1 * float(found.detach().mean()), self.calls + 1
            return found

    trainer = Trainer()
    return functools.partial(trainer.losses, 2.0), lambda: (trainer.calls, trainer.criterion.calls)


STEPS = 0


def global_counter() -> Kept:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        global STEPS
        STEPS += 1
        return entropies(model(batch[0]), batch) / STEPS

    globals()["STEPS"] = 0
    return losses, lambda: STEPS


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        generator_in_a_closure,
        generators_of_python_and_numpy,
        memory_bank,
        running_centre,
        module,
        method_of_a_trainer,
        global_counter,
    ],
)
def test_counts_once(make: Callable[[], Kept], normalised: bool) -> None:
    """Three steps give what an engine gives that runs either batch a single time, and leave what it leaves."""
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    found = []
    for engine in ("double_backward", "auto"):
        model, (losses, kept) = Network(normalised), make()
        dots = [metakern.grad_dots(model, batch, meta_batch, loss_fn=losses, engine=engine).dots for _ in range(3)]
        found.append((torch.stack(dots), torch.tensor(kept(), dtype=torch.float64)))
    for one, other in zip(*found, strict=True):
        budget.assert_within(other, one, 1.0 + one.abs())


def test_a_hook_that_collects() -> None:
    model, seen = Network(False), []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output.isnan().any().item()))
    metakern.l2rw_step(model, *inputs.pair(5, 3, 4, classes=3))
    assert seen == [False, False]


def test_the_second_engine_begins_where_the_first_did() -> None:
    """The centre couples the examples, so ghost refuses after a pass of its own."""
    calls = []

    def losses(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        logits = model(batch[0])
        return entropies(logits - logits.mean(0), batch)

    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    assert metakern.l2rw_step(Network(False), batch, meta_batch, loss_fn=losses).engine == "jvp"
    assert calls == [5, 3]
