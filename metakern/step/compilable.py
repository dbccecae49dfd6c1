"""May a step become a program? What one step shows of itself, and whether the program does the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.losses import LossFunction
from metakern.capture.parameters import trainable_parameters
from metakern.capture.random_state import (
    RandomState,
    random_state,
    restore_random_state,
    same_elsewhere,
    same_torch_state,
    torch_random_state,
)
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state import unchanged_buffers
from metakern.capture.surroundings import Surroundings
from metakern.capture.writes import Writes
from metakern.engines.repetition import agree
from metakern.step.granted import Granted
from metakern.step.own_buffers import buffers_of
from metakern.step.program import Program
from metakern.step.result import StepResult


class Outcome(NamedTuple):
    """What a program returns, in order."""

    result: list[Tensor]  # weights, dots, losses, meta loss
    buffers: list[Tensor]
    gradient: list[Tensor]


def split(found: Sequence[Tensor], buffers: int) -> Outcome:
    end = 4 + buffers
    return Outcome(list(found[:4]), list(found[4:end]), list(found[end:]))


class Seen(NamedTuple):
    """What one step showed."""

    engine: str
    buffers: list[Tensor]  # that it writes
    start: RandomState
    end: RandomState
    outcome: Outcome

    @property
    def draws(self) -> bool:
        """Does it draw from torch's default generators?"""
        return not same_torch_state(self.start, self.end)


def see(
    model: nn.Module, loss_fn: LossFunction | None, granted: Callable[[], Granted], step: Callable[[], StepResult]
) -> Seen:
    """One step that does not count, for what is proved once per model; refuse what a program would do once only."""
    start, known, buffers = random_state(), granted(), [(b, b.detach().clone()) for b in buffers_of(model)]
    around, writes = Surroundings(model, loss_fn), Writes(model)
    try:
        with unchanged_buffers(model):
            with writes.watching():
                *result, engine = step()
            written = [b for b, value in buffers if writes.found(b) or not _same(b, value)]
            outcome = Outcome(result, [b.clone() for b in written], gradients_of(model))
            changed = granted().differs_from(known)
        end = random_state()
    finally:
        restore_random_state(start)
        around.restore()
    if not same_elsewhere(start, end):
        raise EngineUnavailable(
            "the pass draws random numbers from Python or NumPy, which a compiled step would draw once only; draw them "
            "by torch, or use reweight_step"
        )
    if changed:
        raise EngineUnavailable(
            "the pass writes attributes of the model or puts other tensors in place of its buffers, or it counts or "
            "keeps something else from call to call; write into buffers (copy_, mul_), or use reweight_step"
        )
    return Seen(engine, written, start, end, outcome)


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in trainable_parameters(model).values() if p.grad is not None]


def require_same(program: Program, seen: Seen, tensors: list[Tensor]) -> None:
    """Hold the program against that step, in what it draws and in what it gives; and run it where that step ended,
    since what decides the program must not be what the step writes.
    """
    restore_random_state(seen.start)
    found = program([*tensors, *seen.buffers])
    if not same_torch_state(seen.end, torch_random_state()):
        raise EngineUnavailable(
            "a program of the step leaves torch's random generator elsewhere than the step: the pass seeds it, or "
            "repeats other draws than dropout's; use reweight_step"
        )
    if found is None or program([*tensors, *seen.outcome.buffers]) is None:
        raise EngineUnavailable(
            "the pass reads a number that it changes, as BatchNorm does with momentum=None; use reweight_step"
        )
    for got, want in zip(split(found, len(seen.buffers)), seen.outcome, strict=True):
        if not all(map(_alike, got, want)):
            raise EngineUnavailable(
                "a program of the step gives other values than the step, so the pass looks at something that changes "
                "from call to call, as a clock does; use reweight_step"
            )


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _alike(got: Tensor, want: Tensor) -> bool:
    """Equal, but for rounding."""
    if not want.is_floating_point() and not want.is_complex():
        return _same(got, want)
    return got.shape == want.shape and bool(agree(got, want).all())
