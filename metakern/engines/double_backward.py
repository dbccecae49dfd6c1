"""The classic way, kept as the oracle that users can select: differentiate the gradient once more.

g(u) = d(sum_n u_n l_n)/dtheta, and dots = d<g(u), V>/du. Exact wherever every operation has a second derivative;
fused attention has none and is replaced by its plain form.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metakern.capture.graph import differentiable_functions
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.buffers import unchanged_buffers
from metakern.engines.problem import Problem
from metakern.engines.train_pass import GraphPass
from metakern.layers.forward.forms import twice_differentiable


class DifferentiatedPass(GraphPass):
    """Dots by differentiating the gradient once more."""

    form = staticmethod(twice_differentiable)

    def __init__(self, problem: Problem) -> None:
        with twice_differentiable():
            losses = problem.batch_losses()
        super().__init__(problem, losses)

    def dots(self, direction: Mapping[str, Tensor]) -> Tensor:
        return differentiated_twice(self._problem, self._losses, direction)


def differentiated_twice(problem: Problem, losses: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
    """<dl_n/dtheta, V> over the parameters that `direction` names, [n]; the graph of the losses is kept.

    Raises: EngineUnavailable: an operation of the model has no second derivative.
    """
    with unchanged_buffers(problem.model), twice_differentiable():
        dots = _differentiated_twice(problem, losses, direction)
    problem.require_reached(losses)
    return dots


def _differentiated_twice(problem: Problem, losses: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
    if not direction:
        return torch.zeros_like(losses)
    u = torch.ones_like(losses, requires_grad=True)
    parameters = [problem.chosen[name] for name in direction]
    with differentiable_functions(losses):
        grads = torch.autograd.grad(losses, parameters, u, create_graph=True, allow_unused=True)
    along = [(g * v).sum() for g, v in zip(grads, direction.values(), strict=True) if g is not None]
    if not along:
        return torch.zeros_like(losses)
    try:
        (dots,) = torch.autograd.grad(sum(along[1:], along[0]), u, retain_graph=True)
    except RuntimeError as error:  # NotImplementedError is one
        if "derivative for" not in str(error):
            raise
        raise EngineUnavailable(
            f"an operation of the model has no second derivative ({str(error).splitlines()[0]}); use engine='ghost'"
        ) from error
    return dots.detach()
