"""What one entry of the catalogue is: a named model with batches, and what each engine owes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metakern.testing import inputs
from metakern.testing.oracle import LossFn, Oracle, Select, oracle

Owes = Literal["exact", "refuse", "either"]
"""exact: must serve it exactly; refuse: must raise; either: exact or a refusal, never a wrong number."""


@dataclass
class Setup:
    """A model with a train and a meta batch, as the public functions take them."""

    model: nn.Module
    batch: Any
    meta_batch: Any
    loss_fn: LossFn | None = None
    select: Select | None = None
    interacting: bool = False

    def oracle(self, **overrides: Any) -> Oracle:
        keywords = {"loss_fn": self.loss_fn, "select": self.select, "interacting": self.interacting} | overrides
        return oracle(self.model, self.batch, self.meta_batch, **keywords)


@dataclass(frozen=True)
class Case:
    """`make(n, m)` builds the setup, seeded; `ghost`, `jvp` and `auto` say what those engines owe it."""

    name: str
    make: Callable[[int, int], Setup]
    ghost: Owes = "exact"
    jvp: Owes = "either"
    auto: Owes = "exact"


class Classifier(nn.Module):
    """A layer under test between a trained stem and a trained head, so that its input and output gradients are not
    trivial.
    """

    def __init__(self, body: nn.Module, example: Tensor, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 1, 1)
        nn.init.constant_(self.stem.weight, 1.2)
        self.body = body
        with torch.no_grad():
            features = body.to(torch.float32)(example).flatten(1).shape[1]
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1).unsqueeze(1)).view(x.shape)
        return self.head(torch.tanh(self.body(x)).flatten(1))


def layer_case(name: str, build: Callable[[], nn.Module], *shape: int, train: bool = True, **owes: Any) -> Case:
    """The layer that `build` makes, fed examples of `shape` by a stem."""

    def make(n: int, m: int) -> Setup:
        torch.manual_seed(0)
        model = Classifier(build(), inputs.normal(2, *shape, dtype=torch.float32))
        randomise(model)
        batch, meta_batch = inputs.pair(n, m, *shape, classes=3, seed=7)
        return Setup(model.double().train(train), batch, meta_batch)

    return Case(name, make, **owes)


def token_case(
    name: str, build: Callable[[int], nn.Module], length: int = 5, vocabulary: int = 11, **owes: Any
) -> Case:
    """A model of token indices [n, length] that returns three logits."""

    def make(n: int, m: int) -> Setup:
        torch.manual_seed(0)
        model = build(vocabulary)
        randomise(model)
        batch, meta_batch = (
            (inputs.labels(size, length, classes=vocabulary, seed=seed), inputs.labels(size, classes=3, seed=seed + 1))
            for size, seed in ((n, 3), (m, 5))
        )
        return Setup(model.double(), batch, meta_batch)

    return Case(name, make, **owes)


def model_case(name: str, build: Callable[[], nn.Module], *shape: int, **owes: Any) -> Case:
    """A whole model of examples of `shape` that returns three logits."""

    def make(n: int, m: int) -> Setup:
        torch.manual_seed(0)
        model = build()
        randomise(model)
        batch, meta_batch = inputs.pair(n, m, *shape, classes=3, seed=11)
        return Setup(model.double(), batch, meta_batch)

    return Case(name, make, **owes)


def randomise(model: nn.Module) -> None:
    """Disturb every parameter and running statistic: initial ones and zeros hide wrong formulas."""
    maker = inputs.generator(1)
    statistics = [buffer for name, buffer in model.named_buffers() if "running" in name]
    with torch.no_grad():
        for tensor in (*model.parameters(), *statistics):
            tensor.add_(torch.rand(tensor.shape, generator=maker).to(tensor), alpha=0.3)
