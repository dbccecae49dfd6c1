"""Early stopping and fine-tuning on the clean set, around the step of any method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.methods.method import Batch, Begin, Method, Outcome, Prepared, Setting, Setup, Stateful, Step
from metakern.methods.plain_training import predict


def _prepare(step: Step) -> None:
    if isinstance(step, Prepared):
        step.prepare()


def _state(step: Step) -> dict[str, Any]:
    return step.state_dict() if isinstance(step, Stateful) else {}


def _load(step: Step, state: dict[str, Any]) -> None:
    if isinstance(step, Stateful):
        step.load_state_dict(state)


@dataclass
class EarlyStopped:
    """The inner step; `checks` times in the run the model is evaluated on the meta set, and the best one is the result.

    The best model has the lowest error; among equals, the lowest mean loss. When it is restored, the optimizer's state
    is cleared.
    """

    inner: Step
    setup: Setup
    checks: int = 20
    best: tuple[float, float] = (float("inf"), float("inf"))
    kept: dict[str, Tensor] = field(default_factory=dict)

    def prepare(self) -> None:
        _prepare(self.inner)

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        outcome = self.inner(model, batch, meta_batch, optimizer=optimizer, setting=setting)
        taken = setting.step + 1
        if taken % max(1, setting.steps // self.checks) == 0 or taken == setting.steps:
            self._look(model)
        if taken == setting.steps:
            model.load_state_dict(self.kept)
            optimizer.state.clear()
        return outcome

    def _look(self, model: nn.Module) -> None:
        meta = self.setup.task.meta
        logits = predict(model, meta.inputs)
        error = (logits.argmax(1) != meta.targets).double().mean().item()
        measured = error, F.cross_entropy(logits, meta.targets).item()
        if measured < self.best:
            self.best = measured
            self.kept = {name: value.clone() for name, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"inner": _state(self.inner), "best": list(self.best), "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _load(self.inner, state["inner"])
        self.best = (state["best"][0], state["best"][1])
        self.kept = state["kept"]


@dataclass
class FineTuned:
    """The inner step; for the last `share` of the run, plain steps on the meta batch instead.

    The inner step is told that the run ends where these begin. From then on the training batch has no weight: its
    losses are only reported, in evaluation mode, so that it does not change running statistics.
    """

    inner: Step
    share: float

    def prepare(self) -> None:
        _prepare(self.inner)

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        before = max(1, round(setting.steps * (1 - self.share)))
        if setting.step < before:
            return self.inner(model, batch, meta_batch, optimizer=optimizer, setting=replace(setting, steps=before))
        losses = F.cross_entropy(predict(model, batch[0]), batch[1], reduction="none")
        meta_loss = F.cross_entropy(model(meta_batch[0]), meta_batch[1])
        optimizer.zero_grad(set_to_none=True)
        meta_loss.backward()
        optimizer.step()
        return Outcome(torch.zeros_like(losses), losses, meta_loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return _state(self.inner)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _load(self.inner, state)


def early_stopped(begin: Begin) -> Begin:
    """`begin` with early stopping on the meta set."""
    return lambda setup: EarlyStopped(begin(setup), setup)


# Ren et al.'s code fine-tunes for 5,000 steps after 80,000.
FINE_TUNING = 5 / 85


def fine_tuned(begin: Begin, *, share: float = FINE_TUNING) -> Begin:
    """`begin` with fine-tuning on the meta set for the last `share` of the run."""

    def begin_both(setup: Setup) -> Step:
        return FineTuned(begin(replace(setup, steps=max(1, round(setup.steps * (1 - share))))), share)

    return begin_both


_WRAPPERS: dict[str, Callable[[Begin], Begin]] = {"es": early_stopped, "ft": fine_tuned}


def with_phases(method: Method, *phases: str, name: str | None = None) -> Method:
    """`method` with "es" (early stopping on the clean set), "ft" (then fine-tuning on it), or both in that order."""
    begin = method.begin
    for phase in phases:
        begin = _WRAPPERS[phase](begin)
    said = {"es": "early stopping", "ft": "fine-tuning"}
    return replace(
        method,
        name=name or "-".join((method.name, *phases)),
        summary=f"{method.name} with {' and '.join(said[phase] for phase in phases)} on the clean set",
        source="the rows of Ren et al., ICML 2018",
        begin=begin,
        needs_meta=True,
        handles="noise" if method.handles == "none" else method.handles,
    )
