"""MetaBalance: parameters from which one step on the given data does well on balanced data.

As a composition: pairs of a small inner and a small outer batch, each a `metakern.metabalance_step` whose gradient is
added up -> step. This file defines which examples the inner and the outer batches are drawn from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import metakern
from metakern.data import Examples, Task
from metakern.methods.feature_resampling import RESAMPLING_METHODS
from metakern.methods.method import Batch, Method, Outcome, Setting, Setup, Step, TrainingSet, as_given
from metakern.methods.settings import require_counts

SAMPLERS: dict[str, TrainingSet] = {
    "raw": as_given,
    **{method.name: method.training_set for method in RESAMPLING_METHODS},
}


@dataclass(frozen=True)
class BalanceSettings:
    """Settings; the defaults are those of the paper's code for tables.

    inner, outer: the pools that inner and outer batches are drawn from, names of SAMPLERS. order: 2 differentiates
    through the inner step; 1, as the paper's code does, leaves the Hessian out. inner_lr, leak, hessian: as for
    `metakern.metabalance_step`. inner_batch, outer_batch: examples in each batch of a pair, of inner ones at most.
    """

    inner: str = "raw"
    outer: str = "smote"
    order: int = 2
    inner_lr: float = 0.01
    leak: float = 0.01
    hessian: str = "double_backward"
    inner_batch: int = 24
    outer_batch: int = 16

    def __post_init__(self) -> None:
        for pool in (self.inner, self.outer):
            if pool not in SAMPLERS:
                raise ValueError(f"the pools of metabalance are {', '.join(SAMPLERS)}; got {pool!r}")
        require_counts(inner_batch=self.inner_batch, outer_batch=self.outer_batch)


@dataclass(frozen=True, kw_only=True)
class InnerTask(Task):
    """A task whose training examples are the inner pool, made from those of the task `given`."""

    given: Task


class Stream:
    """Rows in batches: all n once, in random order, before any is repeated."""

    def __init__(self, n: int, seed: int) -> None:
        self._n, self._generator = n, torch.Generator().manual_seed(seed)
        self._left = torch.empty(0, dtype=torch.int64)

    def take(self, size: int) -> Tensor:
        """The next `size` rows, at most n."""
        size = min(size, self._n)
        if len(self._left) < size:
            self._left = torch.cat([self._left, torch.randperm(self._n, generator=self._generator)])
        rows, self._left = self._left[:size], self._left[size:]
        return rows

    def state_dict(self) -> dict[str, Tensor]:
        return {"left": self._left, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._left = state["left"]
        self._generator.set_state(state["generator"])


class BalanceStep:
    """A step on the mean gradient of pairs: each inner batch is a part of the batch, paired with an outer batch.

    The parts are as equal as their number allows, and a pair counts in proportion to its inner batch: a small last part
    with an outer batch of its own would otherwise count as much as a whole one.
    """

    def __init__(self, setup: Setup, settings: BalanceSettings) -> None:
        given = setup.task.given if isinstance(setup.task, InnerTask) else setup.task
        device = setup.task.train.targets.device
        outer: Examples = SAMPLERS[settings.outer](given, setup.seed).train
        self._settings = settings
        self.outer = Examples(outer.inputs.to(device), outer.targets.to(device), outer.ids)
        self._stream = Stream(len(outer), setup.seed + 7)

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        """The meta batch is not used. The loss of an example is reported as the mean of its inner batch.

        Source: Bansal et al., "MetaBalance", 2021, and its code.
        """
        inputs, targets = batch
        parts = math.ceil(len(targets) / self._settings.inner_batch)
        inner = list(zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True))
        losses, outer_losses = [], []
        for k, pair in enumerate(inner):
            rows = self._stream.take(self._settings.outer_batch).to(targets.device)
            result = metakern.metabalance_step(
                model,
                pair,
                (self.outer.inputs[rows], self.outer.targets[rows]),
                inner_lr=self._settings.inner_lr,
                order=self._settings.order,
                leak=self._settings.leak,
                hessian=self._settings.hessian,
                scale=len(pair[1]) / len(targets),
                accumulate=k > 0,
                optimizer=optimizer if k == len(inner) - 1 else None,
            )
            losses.append(result.inner_loss.expand(len(pair[1])))
            outer_losses.append(result.outer_loss.expand(len(pair[1])))
        return Outcome(
            losses[0].new_full((len(targets),), 1 / len(targets)), torch.cat(losses), torch.cat(outer_losses).mean()
        )

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])


def inner_task(name: str) -> TrainingSet:
    """The training set of a run whose inner pool is the sampler called `name`."""

    def made(task: Task, seed: int) -> InnerTask:
        pool = SAMPLERS[name](task, seed)
        return InnerTask(**{entry.name: getattr(pool, entry.name) for entry in fields(Task)}, given=task)

    return made


def metabalance(name: str, summary: str, settings: BalanceSettings) -> Method:
    """MetaBalance with the given settings, under a name."""

    def begin(setup: Setup) -> Step:
        return BalanceStep(setup, settings)

    return Method(
        name,
        summary,
        "Bansal et al., 2021",
        begin,
        steps=1000,
        batch_size=81 * settings.inner_batch,
        training_set=as_given if settings.inner == "raw" else inner_task(settings.inner),
        settings=settings,
        rebuilt=partial(metabalance, name, summary),
    )


def find_pools(name: str) -> Method | None:
    """The method of a name "metabalance-INNER-OUTER", INNER and OUTER in SAMPLERS; None for any other name."""
    for inner in SAMPLERS:
        outer = name.removeprefix(f"metabalance-{inner}-")
        if outer != name and outer in SAMPLERS:
            summary = f"inner batches from the pool {inner}, outer ones from {outer}"
            return metabalance(name, summary, BalanceSettings(inner, outer))
    return None


METABALANCE = metabalance(
    "metabalance",
    "one step on the data as they are must land well on data balanced by SMOTE; any pools: metabalance-INNER-OUTER",
    BalanceSettings(),
)
METABALANCE_AS_SHIPPED = metabalance(
    "metabalance-as-shipped",
    "the same without second derivatives, as the published code has it",
    BalanceSettings(order=1),
)
