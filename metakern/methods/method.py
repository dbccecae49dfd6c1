"""What every method is: a name, the settings of its paper, and one function that takes one training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from metakern.data.sampling import shuffled

Batch = tuple[Tensor, Tensor]  # inputs[n, ...], targets[n] int64
Sampler = Callable[[Tensor, int, torch.Generator], Iterator[Tensor]]


@dataclass(frozen=True)
class Setting:
    """What a step may know beyond its two batches.

    class_counts[C] of the training set; a generator for random draws; the share of the run that is done, 0 to 1; and
    the engine that computes dot products.
    """

    class_counts: Tensor
    generator: torch.Generator
    progress: float = 0.0
    engine: str = "auto"

    @property
    def class_shares(self) -> Tensor:
        """The share of each class in the training set, [C] float32."""
        return self.class_counts.float() / self.class_counts.sum()


class Outcome(NamedTuple):
    """What a step reports: the weight each example had in the step, its loss before the step, the meta loss if any."""

    weights: Tensor
    losses: Tensor
    meta_loss: Tensor | None


class Step(Protocol):
    """One optimizer step on `batch`; `meta_batch` is there for the methods that use it."""

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome: ...


# seed -> the step of one run. What a method learns besides the model, such as a weight net, lives in the step.
Begin = Callable[[int], Step]


def always(step: Step) -> Begin:
    """For methods that keep nothing between steps: every run has the same step."""
    return lambda seed: step


@dataclass(frozen=True)
class Method:
    """A training method with the settings its paper's code uses."""

    name: str
    summary: str
    source: str
    begin: Begin
    steps: int = 8000
    batch_size: int = 100
    needs_meta: bool = False
    handles: str = "imbalance"
    sampler: Sampler = shuffled
