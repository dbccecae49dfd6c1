"""Whether a step can be compiled or captured: run one step, and check that the program does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.layout import stored_alike
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.buffers import unchanged_buffers
from metakern.capture.state.function_state import FunctionState
from metakern.capture.state.random_state import (
    RandomState,
    random_state,
    restore_random_state,
    same_elsewhere,
    same_torch_state,
    torch_random_state,
)
from metakern.capture.state.writes import Writes
from metakern.engines.repetition import agree
from metakern.step.programs.assumptions import Assumptions
from metakern.step.programs.own_buffers import buffers_of
from metakern.step.programs.program import Program


class PartResult(NamedTuple):
    """What a step, or a part of it, computes."""

    engine: str
    values: list[Tensor]  # weights, dots, losses
    gradient: dict[Any, Tensor]  # of the model by name, of a second network by parameter
    more: bool = False  # whether another part follows

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.values, *self.gradient.values()]


class ObservedStep(NamedTuple):
    """What one step returned, and what it changed."""

    engine: str
    buffers: list[Tensor]  # those that it writes
    start: RandomState
    end: RandomState
    values: list[Tensor]
    left: list[Tensor]  # the values of these buffers after it
    function_state: FunctionState  # before it

    @property
    def draws(self) -> bool:
        """Whether it draws from torch's default generators."""
        return not same_torch_state(self.start, self.end)


def observe(
    model: nn.Module, functions: Sequence[Any], assumptions: Callable[[], Assumptions], step: Callable[[], PartResult]
) -> ObservedStep:
    """Run one step, which also does what is proved once per model, and undo its effects; reject what a program would
    do only once.

    `functions` are what the step calls besides the model.
    """
    start, known, buffers = random_state(), assumptions(), [(b, b.detach().clone()) for b in buffers_of(model)]
    state, writes = FunctionState(model, *functions), Writes(model)
    with restored_on_error(state):
        try:
            with unchanged_buffers(model):
                with writes.watching():
                    found = step()
                written = [b for b, value in buffers if writes.found(b) or not _same(b, value)]
                left = [b.clone() for b in written]
                changed = assumptions().differs_from(known)
            end = random_state()
            _require_compilable(start, end, found.tensors, changed and _changes(model, assumptions, step))
        finally:
            restore_random_state(start)
    if not changed:
        state.restore()
    return ObservedStep(found.engine, written, start, end, found.tensors, left, state)


@contextmanager
def restored_on_error(state: FunctionState) -> Iterator[None]:
    try:
        yield
    except BaseException:
        state.restore()
        raise


def _require_compilable(start: RandomState, end: RandomState, values: Sequence[Tensor], changes: bool) -> None:
    if not same_elsewhere(start, end):
        raise EngineUnavailable(
            "the pass draws random numbers from Python or NumPy, which a compiled or captured step would draw only "
            "once; draw them with torch, or run the step as it is"
        )
    if any(value.is_sparse for value in values):
        raise EngineUnavailable(
            "a gradient is sparse (of an embedding with sparse=True), which a compiled or captured step cannot return; "
            "make the embedding without sparse=True, or run the step as it is"
        )
    if changes:
        raise EngineUnavailable(
            "the pass writes attributes of the model or replaces its buffers by other tensors, or it counts or "
            "keeps something else from call to call; write into buffers (copy_, mul_), or run the step as it is"
        )


def _changes(model: nn.Module, assumptions: Callable[[], Assumptions], step: Callable[[], PartResult]) -> bool:
    """Whether the step changes anything when it is run again. Some models record on their first call what they were
    called with, as transformers do in `config.problem_type`.
    """
    known = assumptions()
    with unchanged_buffers(model):
        step()
        return assumptions().differs_from(known)


def require_same(program: Program, seen: ObservedStep, tensors: list[Tensor]) -> None:
    """Raise unless the program, which returns values and then buffers, draws and returns what that step did. It is also
    run from where the step ended, since the step must not change numbers that determine the program.
    """
    restore_random_state(seen.start)
    found = results_of(program, [*tensors, *seen.buffers])
    if not same_torch_state(seen.end, torch_random_state()):
        raise EngineUnavailable(
            "the traced step leaves torch's random generator in another state than the step: the pass seeds it, or "
            "repeats other draws than dropout's; run the step uncompiled"
        )
    if found is None or results_of(program, [*tensors, *seen.left]) is None:
        raise EngineUnavailable(
            "the pass reads a number that it changes, as BatchNorm does with momentum=None; run the step uncompiled"
        )
    for got, want in zip(found, [*seen.values, *seen.left], strict=True):
        if not alike(got, want):
            raise EngineUnavailable(
                "the traced step gives other values than the step, so the pass reads something that changes from call "
                "to call, such as a clock; run the step uncompiled"
            )


def require_compiled_as_traced(program: Program, seen: ObservedStep, tensors: list[Tensor]) -> None:
    """Raise unless the compiled program also returns what that step did; not checked if it draws random numbers, whose
    order may differ.
    """
    if seen.draws:
        return
    found, wanted = results_of(program, [*tensors, *seen.buffers]), [*seen.values, *seen.left]
    largest = max(map(_size, wanted))
    if found is None or not all(_nearly(got, want, largest) for got, want in zip(found, wanted, strict=True)):
        raise EngineUnavailable(
            "the compiled program gives other values than the traced one, so the compiler is wrong about an operation "
            "in it (inductor in torch 2.13: about writes into complex tensors, in forward mode); run the step "
            "uncompiled"
        )


@contextmanager
def torch_random_state_as_before() -> Iterator[None]:
    """Torch's default generators are restored after the block."""
    start = torch_random_state()
    try:
        yield
    finally:
        restore_random_state(start)


def results_of(program: Program, tensors: list[Tensor]) -> list[Tensor] | None:
    """What all parts return, or None if a value that determines the program differs."""
    found: list[Tensor] = []
    for part in program(tensors):
        if part is None:
            return None
        found += part
    return found


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and stored_alike(left, right)


def _nearly(got: Tensor, want: Tensor, largest: float) -> bool:
    """Equal up to rounding in another order. Some values may be nothing but rounding (gradients that cancel), so the
    `largest` of all values counts as well.
    """
    if not want.is_floating_point():
        return _same(got, want)
    allowed = {torch.float64: 1e-6, torch.float32: 3e-2}.get(want.dtype, 0.3) * max(_size(want), 1e-3 * largest)
    return got.shape == want.shape and not _size(got.double() - want.double()) > allowed


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0


def alike(got: Tensor, want: Tensor) -> bool:
    """Equal up to rounding."""
    if not want.is_floating_point() and not want.is_complex():
        return _same(got, want)
    return got.shape == want.shape and bool(agree(got, want).all())
