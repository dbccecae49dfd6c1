"""Weight nets: a small network that turns losses into weights, trained on a clean meta batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.losses import LossFunction
from metakern.capture.state.gradients import gradients_aside
from metakern.capture.state.passes import RestorePoint, unchanged_on_error
from metakern.engines import pose
from metakern.engines.choose import open_pass
from metakern.engines.problem import Problem
from metakern.engines.train_pass import TrainPass, plain_pass
from metakern.step.finite import require_finite
from metakern.step.hand_over import hand_over, require_optimizer
from metakern.step.meta_network import (
    Features,
    gradient_of,
    require_meta_network,
    step_meta_network,
    undone_on_error,
)
from metakern.step.meta_pass import virtual_dots
from metakern.step.virtual import VirtualRule
from metakern.step.weighting import NORMALISATIONS, Weighting


class MetaStepResult(NamedTuple):
    """Outcome of a step whose weights come from a network; every tensor is detached."""

    weights: Tensor  # [n], factors of the per-example gradients, normalisation included
    dots: Tensor | None  # [n], s_n = <g_n, v>; None when the weight net was not updated
    losses: Tensor  # [n], before the step
    meta_loss: Tensor | None  # [], mean over the meta batch after the virtual step
    engine: str  # "ghost", "jvp" or "double_backward"; "backward" when the weight net was not updated


def mwnet_step(
    model: nn.Module,
    weight_net: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    weight_optimizer: torch.optim.Optimizer | None,
    virtual_lr: float | None,
    features: Any = None,
    normalise: str = "sum",
    detach_losses: bool = True,
    virtual: str = "sgd",
    update_weight_net: bool = True,
    loss_fn: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    engine: str = "auto",
    params: Any = None,
    accumulate: bool = False,
    memory: str = "reuse",
    allow_unused: bool = False,
) -> MetaStepResult:
    """One step of the weight-net family: virtual step, step of the weight net, real step with the new weights.

    G(l; phi) = sum_n w_n l_n / S,  w_n = weight_net(l_n, features_n; phi),  c_n = dG/dl_n
    theta^ = theta - update(sum_n c_n g_n),  v = (d update/d gradient) g_meta(theta^),  s_n = <g_n(theta), v>
    d meta_loss(theta^)/dphi = - sum_n s_n dc_n/dphi
    .grad = sum_n w_n g_n / S with the new phi

    The meta-gradient is exact, and contains no second derivative of the model. The model runs forward once on `batch`
    and once on `meta_batch`; both gradients and the dots share one pass.

    Args:
        weight_net: called as `weight_net(losses [n, 1], *features)`, returns weights [n] or [n, 1].
        batch, meta_batch, loss_fn, optimizer, engine, params, accumulate, memory, allow_unused: as for `l2rw_step`.
            `params` selects the parameters that the virtual step moves.
        weight_optimizer: steps with the meta-gradient. None leaves the meta-gradient in the weight net's `.grad`, and
            the real step then uses the weights of the current phi.
        virtual_lr: learning rate of the virtual step; None takes that of `optimizer`, for each parameter group.
        features: a tensor, a tuple, or `features(model, batch)`, called after the forward pass of `batch`; treated as
            constants.
        normalise: S is the sum of the weights ("sum"), the same as a constant ("detached_sum"), n ("mean") or 1
            ("none").
        detach_losses: whether the losses enter the weight net as constants; if not, c_n includes l_n dw_n/dl_n.
        virtual: "sgd", or the rule of `optimizer` with its current state: "momentum", "nesterov", "adam",
            "adam_frozen" (second moments treated as constants in the derivative).
        update_weight_net: False skips the virtual step (for an update every k steps); `meta_batch` may then be None.

    Returns: `MetaStepResult(weights [n], dots [n], losses [n], meta_loss [], engine)`; meta_loss is taken at theta^.

    Raises: as `l2rw_step`; model, weight net and its optimizer are then unchanged.

    Source: Shu et al., Meta-Weight-Net, NeurIPS 2019, equations 3 to 7.
    """
    require_weight_net(weight_net, weight_optimizer, normalise, model)
    problem = pose(model, batch, meta_batch, loss_fn, params, memory, allow_unused=allow_unused)
    require_optimizer(optimizer, problem.trainable)
    rule = VirtualRule(virtual, virtual_lr, optimizer)
    if update_weight_net:
        rule.require_usable(problem.chosen)
    with unchanged_on_error(model, problem.writes) as start, undone_on_error(weight_net, weight_optimizer):
        weighting = Weighting(weight_net, normalise, detach_losses)
        given = Features(features)
        dots = meta_loss = None
        with gradients_aside(problem.trainable.values()):
            if update_weight_net:
                train, used, dots, meta_loss, wanted = meta_gradient(problem, start, weighting, given, rule, engine)
                step_meta_network(weight_net, weight_optimizer, wanted)
            else:
                train, used = plain_pass(given.listening(problem))
            weights = weighting.weights(train.losses, given.values)
            gradient = train.weighted_gradient(weights)
        problem.writes.settle()
        hand_over(model, problem.trainable, gradient, optimizer, accumulate)
    return MetaStepResult(weights, dots, train.losses, meta_loss, used)


class MetaGradient(NamedTuple):
    """The weight net's gradient, and the pass over the train batch, from which more results may be asked."""

    train: TrainPass
    engine: str
    dots: Tensor  # [n]
    meta_loss: Tensor  # []
    gradient: dict[nn.Parameter, Tensor]  # d meta_loss(theta^)/dphi


def meta_gradient(
    problem: Problem, start: RestorePoint, weighting: Weighting, features: Features, rule: VirtualRule, engine: str
) -> MetaGradient:
    """d meta_loss(theta^)/dphi = - sum_n s_n dc_n/dphi."""
    train, used = open_pass(features.listening(problem), engine, start)
    coefficients = weighting.coefficients(train.losses, features.values)
    dots, meta_loss = virtual_dots(problem, train, coefficients.detach(), rule)
    require_finite(dots, problem)
    surrogate = -(dots.to(coefficients) * coefficients).sum()
    return MetaGradient(train, used, dots, meta_loss, gradient_of(weighting.weight_net, surrogate))


def require_weight_net(weight_net: Any, optimizer: Any, normalise: str, model: Any) -> None:
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise must be one of {list(NORMALISATIONS)}, got {normalise!r}")
    require_meta_network(weight_net, optimizer, "weight_net", "weight_optimizer", model)
