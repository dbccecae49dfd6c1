"""Which engine answers: the cheapest exact one. An engine asked for by name never falls back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TypeVar
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from metakern.capture.examples import new_in_a_row
from metakern.capture.members import modules_of
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state import Start
from metakern.engines import double_backward, ghost, jvp
from metakern.engines.problem import Answer, Problem

ENGINES: dict[str, Callable[[Problem], Answer]] = {
    "ghost": ghost.solve,
    "jvp": jvp.solve,
    "double_backward": double_backward.solve,
}

T = TypeVar("T")

_SERVED: WeakSet[nn.Module] = WeakSet()
"""Models whose last step was ghost's: it will most likely serve the next one, and no way back need be kept."""


def solve(problem: Problem, engine: str, start: Start) -> tuple[Answer, str]:
    """The answer, and the name of the engine that gave it.

    Raises: as `first_exact`.
    """
    return first_exact(ENGINES, problem, engine, start)


def first_exact(
    engines: Mapping[str, Callable[[Problem], T]], problem: Problem, engine: str, start: Start
) -> tuple[T, str]:
    """What the engine asked for makes of the problem, with "auto" the cheapest exact one, and the name of the engine;
    the second one tried begins at `start`, as the first did.

    Raises:
        ValueError: no engine of that name.
        EngineUnavailable: the engine asked for, or with "auto" none, is exact for this model; the message says why.
    """
    if engine != "auto":
        if engine not in engines:
            raise ValueError(f"engine must be 'auto' or one of {sorted(engines)}, got {engine!r}")
        with ghost_first(problem) if engine == "ghost" else nullcontext():
            return engines[engine](problem), engine
    if normalises_over_batch(problem.model) or _never_twice_alike(problem.model):
        return engines["jvp"](problem), "jvp"
    try:
        with ghost_first(problem):
            return engines["ghost"](problem), "ghost"
    except EngineUnavailable as error:
        refusal = str(error)  # the error itself would hold, by its traceback, what ghost's pass has kept
    start.restore()
    try:
        return engines["jvp"](problem), "jvp"
    except EngineUnavailable as second:
        raise EngineUnavailable(
            f"neither ghost nor jvp is exact here (engine='double_backward' may be, at several times the price). "
            f"ghost: {refusal}. jvp: {second}"
        ) from second


@contextmanager
def ghost_first(problem: Problem) -> Iterator[None]:
    """Where ghost refuses, or its proof fails, what it moved on outside the model can go back."""
    if problem.model not in _SERVED:
        problem.writes.look_around(problem.loss_fn)
    try:
        yield
        _SERVED.add(problem.model)
    except EngineUnavailable:
        _SERVED.discard(problem.model)
        raise


_ALL_NEW, _PASSED_BY = 16, 32
"""So many structures in a row that ghost had not met before, and in one step of so many it is asked all the same."""
_TURNS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _never_twice_alike(model: nn.Module) -> bool:
    """Has every batch another structure, as with a loss that branches in a loop over examples? Each would have to be
    proved anew, at the price of some ten steps; forward mode has nothing to prove.
    """
    if new_in_a_row(model) < _ALL_NEW:
        return False
    turn = _TURNS[model] = _TURNS.get(model, -1) + 1
    if turn == 0:
        warnings.warn(
            f"each of the last {_ALL_NEW} batches of {type(model).__name__} made another graph, as a loss does that "
            "branches in a Python loop over its examples, and independence had to be proved for each; engine='auto' "
            "takes forward mode now. Without branches and loops (masks, index_add) a step takes a fraction of the time",
            stacklevel=2,
        )
    return (turn + 1) % _PASSED_BY != 0


def normalises_over_batch(model: nn.Module) -> bool:
    """Known without a pass: batch statistics make examples interact, so tracing would be in vain."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        for module in modules_of(model)
    )
