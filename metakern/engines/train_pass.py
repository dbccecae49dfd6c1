"""A pass over the train batch that answers more than once: dots along any direction, gradients of any weighting.

Each engine has one. L2RW needs one direction and one weighting. A virtual step needs the gradient of one weighting
first, then the dots along a direction found at other parameters, then the gradient of another weighting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from metakern.engines.problem import Answer, Problem
from metakern.engines.recorded import Names
from metakern.engines.weighted_backward import weighted_backward


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


def answered(
    train: TrainPass, problem: Problem, along: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
) -> Answer:
    """The dots along the meta gradient V, or along `along(V)`."""
    meta_loss, v = problem.meta_gradient()
    return Answer(train.dots(v if along is None else along(v)), train.losses, meta_loss, train.weighted_gradient)


class GraphPass:
    """The graph of the losses; weighted gradients are ordinary backward passes over it."""

    form: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The context in which the graph was made; checkpointed layers need it again in the backward pass."""

    def __init__(self, problem: Problem, losses: Tensor) -> None:
        self._problem, self._losses = problem, losses
        self.losses = losses.detach()

    def weighted_gradient(self, weights: Tensor, keep: bool = False, only: Names | None = None) -> dict[str, Tensor]:
        return weighted_backward(self._problem, self._losses, weights, keep, only, self.form)


def plain_pass(problem: Problem) -> tuple[GraphPass, str]:
    """A forward pass for weighted gradients only, which every model allows; it has no dots."""
    problem.writes.keep_functions(problem.loss_fn)
    return GraphPass(problem, problem.batch_losses()), "backward"
