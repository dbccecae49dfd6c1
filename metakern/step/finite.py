"""A step must not go on with values that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.capture.graph import computes_in
from metakern.capture.host import finite_sum, host_may_wait
from metakern.capture.state.passes import PassState
from metakern.engines.problem import Problem


def require_finite(dots: Tensor, problem: Problem) -> None:
    """Raise ValueError unless the dots are finite."""
    _require(
        dots,
        problem,
        "the gradients of examples {} are not finite although their losses are; nothing was changed (look for a "
        "division by zero or an overflow in the backward pass)",
    )


def require_finite_weights(weights: Tensor, problem: Problem) -> None:
    """Raise ValueError unless the weights of a user's rule are finite."""
    _require(weights, problem, "rule returned weights that are not finite for examples {}; nothing was changed")


def _require(values: Tensor, problem: Problem, message: str) -> None:
    """float16 may overflow, and is left to a GradScaler, which then skips the step."""
    if not host_may_wait() or finite_sum(values) or _uses_float16(problem):
        return
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(message.format(bad[:10]))


def _uses_float16(problem: Problem) -> bool:
    kind = next(iter(problem.trainable.values())).device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return autocast or any(p.dtype == torch.float16 for p in problem.trainable.values()) or _float16_inside(problem)


def _float16_inside(problem: Problem) -> bool:
    """Whether the model or the loss has an autocast of its own; to see that takes another forward pass."""
    with PassState(problem.model, problem.loss_fn, problem.writes).replayed(), torch.enable_grad():
        return computes_in(problem.batch_losses(), torch.float16)
