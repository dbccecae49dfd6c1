"""A part of a batch as a separate problem, and the proof that it may be treated as one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from metakern.capture.losses import evaluate_losses
from metakern.capture.members import modules_of
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.repeatable import repeatable_layers
from metakern.capture.state.passes import PassState, PythonState
from metakern.capture.state.random_state import random_state, restore_random_state, same_state
from metakern.engines.cut import cut, examples_of, spread
from metakern.engines.part_buffers import PartBuffers
from metakern.engines.problem import Problem
from metakern.engines.recorded import recorded


def part_of(problem: Problem, batch: Any, reached: set[int], **changes: Any) -> Problem:
    """A part of the batch. The parameters that it uses are added to `reached`; it is no error if some are missing."""
    return replace(problem, batch=batch, reached=reached, **changes)


def examples_in(batch: Any) -> int:
    return max(examples_of(batch, "batch"), 1)


def require_count(losses: Tensor, batch: Any) -> None:
    if losses.shape[0] != examples_in(batch):
        raise ValueError(
            f"micro_batch took {examples_in(batch)} examples of the batch along dimension 0 of its tensors, but they "
            f"have {losses.shape[0]} losses; the first dimension of every tensor must be the examples"
        )


def require_independent(problem: Problem, batch: Any) -> None:
    """Raise EngineUnavailable if the examples of this batch interact; the pass leaves no trace."""
    with PassState(problem.model, problem.loss_fn).replayed():
        recorded(part_of(problem, batch, set()))


def require_same_in_parts(problem: Problem, batch: Any, size: int, argument: str) -> None:
    """Raise if examples have other losses together than in parts, as with a mean over the batch's tokens.

    The proof of independence is about gradients: it sees neither a loss divided by a count over the batch nor a buffer
    that accumulates. Random numbers would differ between the passes, so if there are any, the losses are compared in
    eval mode; if there still are, only buffers are. The first check takes as many examples as two parts have, but at
    least eight; later ones take four, each time others. They are from all over the batch, which may be sorted by
    length.
    """
    kind = (problem.context, argument, examples_in(batch), size)
    checked = _CHECKED.setdefault(problem.model, {})
    times = checked.get(kind, 0)
    some = spread(batch, 4 if times else max(2 * size, 8), argument, phase=(0.5 + times * _GOLDEN) % 1)
    _require_same(problem, some, min(2, size) if times else size, argument)
    checked[kind] = times + 1


_CHECKED: WeakKeyDictionary[nn.Module, dict[Hashable, int]] = WeakKeyDictionary()
_GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, without their whole part, are evenly spread however many there are."""


def _require_same(problem: Problem, some: Any, size: int, argument: str) -> None:
    if examples_in(some) <= size:
        return
    state = random_state()

    def losses(batch: Any, buffers: PartBuffers) -> Tensor:
        # gradients stay enabled: a loss may take some inside
        with buffers.of_part(examples_in(batch)), repeatable_layers(problem.model):
            found = evaluate_losses(problem.model, batch, problem.loss_fn, argument).detach()
        require_count(found, batch)
        return found

    def compared() -> tuple[Tensor, Tensor, bool]:
        """Losses of all examples together and in parts, and whether random numbers were drawn."""
        buffers, held = PartBuffers(problem.model), PythonState(problem.model, problem.loss_fn)
        together, drawn = losses(some, buffers), not same_state(state, random_state())
        held.restore()  # what the loss remembers of an example, it has not seen yet
        apart = torch.cat([losses(part, buffers) for part in cut(some, size, argument)])
        restore_random_state(state)
        held.restore()
        return together, apart, drawn

    together, apart, drawn = compared()
    if drawn:
        with evaluating(problem.model):
            together, apart, drawn = compared()
    if not drawn and bool(((together - apart).abs() > _rounding(problem) * (1 + together.abs())).any()):
        raise EngineUnavailable(
            f"the losses of {len(together)} examples of {argument} together differ from those in parts of {size} "
            f"({together.tolist()[:8]} against {apart.tolist()[:8]}), so the loss counts over the batch; leave out "
            "micro_batch, or make loss_fn divide by counts of each example alone"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode, by their attribute: `eval` itself may be overridden."""
    training = [module for module in modules_of(model) if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _rounding(problem: Problem) -> float:
    """How much two passes over the same example may differ, relative to its loss."""
    kind = next(iter(problem.trainable.values())).device.type
    half = torch.is_autocast_enabled(kind) or any(p.element_size() < 4 for p in problem.trainable.values())
    return 0.1 if half else 1e-3
