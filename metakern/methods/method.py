"""What a method is: a name, the settings of its paper, and a function that takes one training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from metakern.data import Task
from metakern.data.sampling import shuffled

Batch = tuple[Tensor, Tensor]  # inputs[n, ...], targets[n] int64
Sampler = Callable[[Tensor, int, torch.Generator], Iterator[Tensor]]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
RateFactor = Callable[
    [int, int], float
]  # step k = 0 .. steps - 1 of how many: its learning rate in shares of the run's
Augment = Callable[[Tensor, torch.Generator], Tensor]  # inputs[n, ...] -> the same, changed at random


DEFERRED = 0.8  # share of the run after which deferred weights or batches begin: from epoch 160 of 200 in the papers


def _steady(step: int, steps: int) -> float:
    return 1.0


def unchanged(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """No augmentation."""
    return inputs


class NotApplicable(ValueError):
    """The method does not support data of this kind. A comparison continues without it."""


@dataclass(frozen=True)
class Setup:
    """What a run offers a method before its first step.

    The task, on the device of the model; the model, with its initial parameters until the first step; the seed of the
    run; its number of optimizer steps and its batch size. For other models: a function that makes the run's optimizer,
    its learning-rate schedule, and how it augments inputs. `progress` is whether long work before the first step shows
    a progress bar.
    """

    task: Task
    model: nn.Module
    seed: int
    steps: int
    batch_size: int
    make_optimizer: MakeOptimizer
    progress: bool = False
    rate_factor: RateFactor = _steady
    augment: Augment = unchanged

    @property
    def classes(self) -> int:
        """The number of classes, C."""
        return len(self.task.class_names)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in which every training example is used about once."""
        return max(1, round(len(self.task.train) / self.batch_size))


@dataclass(frozen=True)
class Setting:
    """What a step may know in addition to its two batches.

    class_counts[C] of the training set; a generator for random draws; the engine that computes dot products; the rows
    of the batch in `task.train`, indices[n] int64; the number of this step, from 0, and how many `steps` the run has.
    """

    class_counts: Tensor
    generator: torch.Generator
    engine: str = "auto"
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    step: int = 0
    steps: int = 1

    @property
    def progress(self) -> float:
        """The share of the run that lies before this step, 0 to 1."""
        return self.step / self.steps

    @property
    def class_shares(self) -> Tensor:
        """The share of each class in the training set, [C] float32."""
        return self.class_counts.float() / self.class_counts.sum()


class Outcome(NamedTuple):
    """What a step reports: weight of each example, its loss before the step, and the meta loss, if any."""

    weights: Tensor
    losses: Tensor
    meta_loss: Tensor | None


class Step(Protocol):
    """One optimizer step on `batch`; `meta_batch` is for the methods that use it.

    A plain function, or an object that may also have `state_dict()` and `load_state_dict(state)`, for what it has
    learned besides the model, in tensors and numbers; and `prepare()`, for work before the first step, such as training
    a network to learn from. `prepare` is not called when a run resumes from a checkpoint, so its results belong in the
    state.
    """

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome: ...


@runtime_checkable
class Prepared(Protocol):
    """A step with work to do before the first step."""

    def prepare(self) -> None: ...


@runtime_checkable
class Stateful(Protocol):
    """A step that has learned something besides the model."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class WeightingFunction(NamedTuple):
    """What a weight net has learned, as functions of one quantity: `weights` by name, each at the points `at`[k]."""

    quantity: str
    at: Tensor
    weights: dict[str, Tensor]


@runtime_checkable
class Explained(Protocol):
    """A step whose learned weighting can be plotted."""

    def weighting_function(self) -> WeightingFunction: ...


# The step of one run. What a method learns besides the model, such as a weight net, lives in the step.
Begin = Callable[[Setup], Step]


def always(step: Step) -> Begin:
    """For methods that keep no state between steps: every run uses the same step."""
    return lambda setup: step


# A task and a seed -> the task with the training set that the method draws its batches from.
TrainingSet = Callable[[Task, int], Task]
# For methods that are no sequence of optimizer steps: the setup of a run -> inputs to logits.
Fit = Callable[[Setup], nn.Module]


def as_given(task: Task, seed: int) -> Task:
    """Training on the examples of the task."""
    return task


def no_steps(setup: Setup) -> Step:
    """The `begin` of methods that have `fit` instead.

    Raises: ValueError, always.
    """
    raise ValueError("this method fits its model as a whole: it has no steps that a loop could take")


@dataclass(frozen=True)
class Method:
    """A training method with the settings of its paper's code.

    If `meta_batch_size` is None, every step gets the whole meta set; otherwise `meta_sampler` draws that many examples.
    `late_sampler`, if there is one, takes the place of `sampler` after the share DEFERRED of the run.
    `training_set` may re-sample the training examples before the run; `fit` replaces the training loop. `settings` is a
    dataclass of everything else that the paper sets, and `rebuilt(settings)` is the method with other ones.
    """

    name: str
    summary: str
    source: str
    begin: Begin
    steps: int = 8000
    batch_size: int = 100
    needs_meta: bool = False
    handles: str = "imbalance"
    sampler: Sampler = shuffled
    late_sampler: Sampler | None = None
    meta_batch_size: int | None = None
    meta_sampler: Sampler = shuffled
    training_set: TrainingSet = as_given
    fit: Fit | None = None
    settings: Any = None
    rebuilt: Callable[[Any], Method] | None = None
