"""A pass over the train batch that answers more than once: dots along any direction, gradients of any weighting.

`solve` needs one direction and one weighting. A virtual step needs the gradient of one weighting first, then the dots
along a direction found at other parameters, then the gradient of another weighting, all of the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from metakern.capture.state.passes import PassState, RestorePoint
from metakern.engines import jvp
from metakern.engines.choose import first_exact
from metakern.engines.double_backward import differentiated_twice
from metakern.engines.problem import Problem
from metakern.engines.recorded import Names, recorded
from metakern.engines.weighted_backward import weighted_backward
from metakern.layers.forward.forms import twice_differentiable


class TrainPass(Protocol):
    """One forward pass of the train batch at theta."""

    losses: Tensor  # [n], detached

    def dots(self, direction: Mapping[str, Tensor]) -> Tensor:
        """<dl_n/dtheta, V> over the parameters that `direction` names, [n]."""
        ...

    def weighted_gradient(self, weights: Tensor, keep: bool = False, only: Names | None = None) -> dict[str, Tensor]:
        """sum_n weights_n dl_n/dtheta by name, for every trainable parameter or for some; ends the pass unless `keep`.

        A parameter asked for by `only` that the losses do not depend on may be missing; otherwise that is an error.
        """
        ...


class GhostPass:
    """Dots by the per-use records, see `metakern.engines.recorded`."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self.records = problem, recorded(problem, fold=problem.chosen)
        self.losses = self.records.losses

    def dots(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self.records.dots_along(self._problem.by_identity(direction))

    def weighted_gradient(self, weights: Tensor, keep: bool = False, only: Names | None = None) -> dict[str, Tensor]:
        return self.records.weighted_gradient(weights, keep, only)


class GraphPass:
    """The graph of the losses; weighted gradients are ordinary backward passes over it."""

    form: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The context in which the graph was made; checkpointed layers need it again in the backward pass."""

    def __init__(self, problem: Problem, losses: Tensor) -> None:
        self._problem, self._losses = problem, losses
        self.losses = losses.detach()

    def weighted_gradient(self, weights: Tensor, keep: bool = False, only: Names | None = None) -> dict[str, Tensor]:
        return weighted_backward(self._problem, self._losses, weights, keep, only, self.form)


class _Dual(GraphPass):
    """Dots by forward mode, in a second forward pass with the random numbers and buffers of the first."""

    form = staticmethod(jvp.PLAIN_ATTENTION)

    def __init__(self, problem: Problem) -> None:
        self._start = PassState(problem.model, problem.loss_fn, problem.writes)
        with jvp.first_pass(problem) as self._products:  # in the form of the dual pass, so that masks are the same
            losses = problem.batch_losses()
        super().__init__(problem, losses)
        jvp.require_forward_mode(problem, losses, self._start, self._products)
        problem.require_reached(losses)

    def dots(self, direction: Mapping[str, Tensor]) -> Tensor:
        return jvp.loss_tangents(self._problem, dict(direction), self._start, self.losses, self._products)


class _Differentiated(GraphPass):
    """Dots by differentiating the gradient once more."""

    form = staticmethod(twice_differentiable)

    def __init__(self, problem: Problem) -> None:
        with twice_differentiable():
            losses = problem.batch_losses()
        super().__init__(problem, losses)

    def dots(self, direction: Mapping[str, Tensor]) -> Tensor:
        return differentiated_twice(self._problem, self._losses, direction)


_PASSES: dict[str, Callable[[Problem], TrainPass]] = {
    "ghost": GhostPass,
    "jvp": _Dual,
    "double_backward": _Differentiated,
}


def open_pass(problem: Problem, engine: str, start: RestorePoint) -> tuple[TrainPass, str]:
    """The forward pass of the train batch by the engine asked for, or by the cheapest exact one, and its name.

    Raises: as `metakern.engines.solve`; that an operation has no forward mode shows when dots are asked for.
    """
    return first_exact(_PASSES, problem, engine, start)


def plain_pass(problem: Problem) -> tuple[GraphPass, str]:
    """A forward pass for weighted gradients only, which every model allows; it has no dots."""
    problem.writes.keep_functions(problem.loss_fn)
    return GraphPass(problem, problem.batch_losses()), "backward"
