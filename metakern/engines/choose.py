"""Which engine runs: the cheapest exact one. An engine requested by name never falls back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from metakern.capture.independence.examples import new_in_a_row
from metakern.capture.members import modules_of
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.passes import RestorePoint
from metakern.engines import ghost
from metakern.engines.double_backward import DifferentiatedPass
from metakern.engines.jvp import DualPass
from metakern.engines.problem import Answer, Problem
from metakern.engines.train_pass import TrainPass, answered

T = TypeVar("T")

PASSES: dict[str, Callable[[Problem], TrainPass]] = {
    "ghost": ghost.GhostPass,
    "jvp": DualPass,
    "double_backward": DifferentiatedPass,
}


def open_pass(problem: Problem, engine: str, start: RestorePoint) -> tuple[TrainPass, str]:
    """The pass of the train batch by the engine asked for, or by the cheapest exact one, and its name.

    Raises: as `first_exact`; that an operation has no forward mode may show only when dots are asked for.
    """
    return first_exact(PASSES, problem, engine, start)


def solve(problem: Problem, engine: str, start: RestorePoint) -> tuple[Answer, str]:
    """Dots along the meta gradient itself and one weighted gradient, and the name of the engine that gave them.

    Raises: as `first_exact`.
    """
    return first_exact(_SOLVERS, problem, engine, start)


def _by_pass(engine: str) -> Callable[[Problem], Answer]:
    return lambda problem: answered(PASSES[engine](problem), problem)


_SOLVERS = {"ghost": ghost.solve, "jvp": _by_pass("jvp"), "double_backward": _by_pass("double_backward")}


def first_exact(
    engines: Mapping[str, Callable[[Problem], T]], problem: Problem, engine: str, start: RestorePoint
) -> tuple[T, str]:
    """The answer of the requested engine (with "auto", of the cheapest exact one), and its name. If a second engine is
    tried, the model is first reset to `start`.

    Raises:
        ValueError: no engine of that name.
        EngineUnavailable: the requested engine is not exact for this model, or with "auto" none is; the message says
            why.
    """
    if engine != "auto" and engine not in engines:
        raise ValueError(f"engine must be 'auto' or one of {sorted(engines)}, got {engine!r}")
    problem.writes.keep_functions(problem.loss_fn)  # the loss's state, to be restored if ghost rejects the problem
    if engine != "auto":
        return engines[engine](problem), engine
    if normalises_over_batch(problem.model) or _never_twice_alike(problem.model):
        return engines["jvp"](problem), "jvp"
    try:
        return engines["ghost"](problem), "ghost"
    except EngineUnavailable as error:
        refusal = str(error)  # the error itself would keep alive, by its traceback, what ghost's pass has kept
    start.restore()
    try:
        return engines["jvp"](problem), "jvp"
    except EngineUnavailable as second:
        raise EngineUnavailable(
            f"neither ghost nor jvp is exact here (engine='double_backward' may be, at several times the cost). "
            f"ghost: {refusal}. jvp: {second}"
        ) from second


_ALL_NEW, _PASSED_BY = 16, 32
"""After so many new structures in a row ghost is skipped, but still tried in one step out of so many."""
_TURNS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _never_twice_alike(model: nn.Module) -> bool:
    """Whether every batch has a new structure, as with a loss that branches in a loop over examples. Each would need a
    proof of its own, at the cost of some ten steps; forward mode has nothing to prove.
    """
    if new_in_a_row(model) < _ALL_NEW:
        return False
    turn = _TURNS[model] = _TURNS.get(model, -1) + 1
    if turn == 0:
        warnings.warn(
            f"each of the last {_ALL_NEW} batches of {type(model).__name__} made another graph, as with a loss that "
            "branches in a Python loop over examples, and independence had to be proved for each; engine='auto' now "
            "uses forward mode. Without branches and loops (use masks, index_add), a step takes a fraction of the time",
            stacklevel=2,
        )
    return (turn + 1) % _PASSED_BY != 0


def normalises_over_batch(model: nn.Module) -> bool:
    """Whether batch statistics make examples interact: this is known without a pass, so tracing can be skipped."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        for module in modules_of(model)
    )
