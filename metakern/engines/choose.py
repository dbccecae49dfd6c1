"""Which engine answers: the cheapest exact one. An engine asked for by name never falls back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from weakref import WeakSet

from torch import nn

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

_SERVED: WeakSet[nn.Module] = WeakSet()
"""Models whose last step was ghost's: it will most likely serve the next one, and no way back need be kept."""


def solve(problem: Problem, engine: str, start: Start) -> tuple[Answer, str]:
    """The answer, and the name of the engine that gave it; the second one tried begins at `start`, as the first did.

    Raises:
        ValueError: no engine of that name.
        EngineUnavailable: the engine asked for, or with "auto" none, is exact for this model; the message says why.
    """
    if engine != "auto":
        if engine not in ENGINES:
            raise ValueError(f"engine must be 'auto' or one of {sorted(ENGINES)}, got {engine!r}")
        with ghost_first(problem) if engine == "ghost" else nullcontext():
            return ENGINES[engine](problem), engine
    if normalises_over_batch(problem.model):
        return jvp.solve(problem), "jvp"
    try:
        with ghost_first(problem):
            return ghost.solve(problem), "ghost"
    except EngineUnavailable as error:
        refusal = str(error)  # the error itself would hold, by its traceback, what ghost's pass has kept
    start.restore()
    try:
        return jvp.solve(problem), "jvp"
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


def normalises_over_batch(model: nn.Module) -> bool:
    """Known without a pass: batch statistics make examples interact, so tracing would be in vain."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        for module in modules_of(model)
    )
