"""The meta batch at theta^, the parameters after a virtual step, and the dots along the direction that this gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.passes import PassState
from metakern.capture.state.random_state import random_state, restore_random_state
from metakern.engines.ghost import GhostPass
from metakern.engines.implicit import Move, Moving, implicit_weights, move
from metakern.engines.problem import Problem, named_gradients
from metakern.engines.recorded import Recorded
from metakern.engines.substitution import require_replaced, substituted
from metakern.engines.train_pass import TrainPass
from metakern.step.virtual import VirtualRule


def meta_gradient_at(problem: Problem, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean meta loss at other parameters, and its gradient there, by one plain forward and backward pass.

    Model, parameters and buffers are not touched; the dict is emptied, since its tensors are as large as the model. A
    parameter that the meta loss does not depend on has no gradient.
    """
    leaves = {name: parameters.pop(name).detach().requires_grad_() for name in list(parameters)}
    meta_loss, found = _meta_pass_at(problem, leaves, {}, ())
    return meta_loss, named_gradients(leaves, found)


def _meta_pass_at(
    problem: Problem, leaves: Mapping[str, Tensor], moves: Mapping[str, Move], others: Iterable[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """Mean meta loss with parameters replaced by leaves or moved implicitly; its gradients in leaves and `others`.

    Raises: EngineUnavailable if a parameter is used in a way that escapes both.
    """
    chosen = problem.chosen
    moving = Moving({id(chosen[name]): given for name, given in moves.items()})
    replaced = substituted(problem.model, {id(chosen[name]): leaf for name, leaf in leaves.items()})
    names = [name for name, p in chosen.items() if name in leaves or moving.moves(p)]
    # The backward pass runs inside as well: checkpointed layers run their forward pass again there.
    with problem.writes.meta_pass(), replaced, moving if moves else nullcontext():
        meta_loss = problem.meta_losses().mean()
        moving.require_served()
        wanted = [*leaves.values(), *others]
        asked = [*wanted, *(chosen[name] for name in names)]  # none, where no chosen parameter took part
        found = torch.autograd.grad(meta_loss, asked, allow_unused=True) if asked else ()
    require_replaced(names, found[len(wanted) :])
    return meta_loss.detach(), list(found[: len(wanted)])


def virtual_dots(problem: Problem, train: TrainPass, coefficients: Tensor, rule: VirtualRule) -> tuple[Tensor, Tensor]:
    """s_n = <g_n(theta), J g_meta(theta^)>, [n], and the meta loss at theta^ = theta - update(sum_n c_n g_n).

    Raises: EngineUnavailable if the first implicit virtual step of a structure disagrees with the explicit one.
    """
    if rule.affine and isinstance(train, GhostPass) and isinstance(train.records, Recorded):
        first = train.records.expected
        start = None if first is None else PassState(problem.model, problem.loss_fn, problem.writes)
        found = _implicit_dots(problem, train.records, coefficients, rule)
        if found is not None:
            if first is not None and start is not None:
                with start.replayed():
                    v, _ = _direction(problem, train, coefficients, rule)
                first.require_same(found[0], train.dots(dict(v)), v.values(), "a dot of an implicit virtual step")
            return found
    v, meta_loss = _direction(problem, train, coefficients, rule)
    return train.dots(v), meta_loss


def _direction(
    problem: Problem, train: TrainPass, coefficients: Tensor, rule: VirtualRule
) -> tuple[dict[str, Tensor], Tensor]:
    """J g_meta(theta^), and the meta loss there."""
    step = rule.step(problem.chosen, train.weighted_gradient(coefficients, keep=True, only=problem.chosen))
    meta_loss, meta_gradient = meta_gradient_at(problem, step.parameters)
    return step.pulled_back(meta_gradient), meta_loss


def _implicit_dots(
    problem: Problem, train: Recorded, coefficients: Tensor, rule: VirtualRule
) -> tuple[Tensor, Tensor] | None:
    """The same without forming theta^ of weights that are large compared with the meta rows; None if there are none."""
    uses = implicit_weights(problem, train)
    if not uses:
        return None
    implicit = {*uses, *(use.bias for use in uses.values())}
    rest = {name: p for name, p in problem.chosen.items() if name not in implicit}
    step = rule.step(rest, train.weighted_gradient(coefficients, keep=True, only=rest))
    origin = rule.origin({name: p for name, p in problem.chosen.items() if name in implicit})
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in step.parameters.items()}
    c = coefficients.detach().requires_grad_()
    moves = {name: move(problem, train, name, use, origin, c) for name, use in uses.items()}
    before = random_state()
    try:
        meta_loss, found = _meta_pass_at(problem, leaves, moves, [c])
    except EngineUnavailable:
        restore_random_state(before)
        return None
    v = step.pulled_back(named_gradients(leaves, found))
    dots = train.dots_along(problem.by_identity(v))
    slope = found[-1]  # of the meta loss in c, through the weights that moved implicitly
    return dots if slope is None else dots - slope, meta_loss
