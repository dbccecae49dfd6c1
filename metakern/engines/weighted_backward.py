"""The weighted gradient by an ordinary backward pass, for engines that keep the graph of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.engines.problem import Problem


def weighted_backward(problem: Problem, losses: Tensor, weights: Tensor, keep: bool = False) -> dict[str, Tensor]:
    """sum_n w_n dl_n/dtheta for every trainable parameter, by name; `keep` leaves the graph for another call.

    Raises: ValueError if a parameter took no part.
    """
    found = torch.autograd.grad(
        losses, list(problem.trainable.values()), weights.to(losses.dtype), retain_graph=keep, allow_unused=True
    )
    problem.require_participation({id(p) for p, g in zip(problem.trainable.values(), found) if g is not None})
    return {name: g for name, g in zip(problem.trainable, found) if g is not None}
