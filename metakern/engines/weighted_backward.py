"""The weighted gradient by an ordinary backward pass, for engines that keep the graph of the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.state.buffers import unchanged_buffers
from metakern.capture.state.gradients import nothing_added
from metakern.engines.problem import Problem


def weighted_backward(
    problem: Problem,
    losses: Tensor,
    weights: Tensor,
    keep: bool = False,
    only: Mapping[str, nn.Parameter] | None = None,
    form: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """sum_n w_n dl_n/dtheta by name, for every trainable parameter or for some; `keep` keeps the graph for more.

    Checkpointed layers run again in a backward pass, in the `form` that the graph was made in. Their writes into
    buffers count once, in the last pass.

    Raises: ValueError if a trainable parameter took no part, unless only some were requested.
    """
    parameters = problem.trainable if only is None else only
    weights = weights.to(losses.dtype, copy=True)  # autograd may return them as a gradient if losses add a parameter
    with unchanged_buffers(problem.model) if keep else nullcontext(), form(), nothing_added(problem.trainable):
        found = torch.autograd.grad(losses, list(parameters.values()), weights, retain_graph=keep, allow_unused=True)
    reached = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    if only is None:
        problem.require_participation({id(parameters[name]) for name in reached})
    return reached
