"""MetaBalance: learn parameters from which one step on imbalanced data does well on balanced data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.graph import differentiable_functions
from metakern.capture.losses import LossFunction, per_example_losses
from metakern.capture.state.gradients import gradients_aside
from metakern.capture.state.passes import PassState, unchanged_on_error
from metakern.engines import pose, twice_differentiable
from metakern.engines.problem import Problem, named_gradients
from metakern.engines.substitution import require_replaced, substituted
from metakern.step.hand_over import hand_over, require_optimizer
from metakern.weighted_grad import added

HESSIANS = ("double_backward", "central_difference")


class MetaBalanceResult(NamedTuple):
    """Outcome of a MetaBalance step; every tensor is detached."""

    inner_loss: Tensor  # [], mean over the inner batch at theta
    outer_loss: Tensor  # [], mean over the outer batch at theta'
    alignment: Tensor  # [], <g_in(theta), g_out(theta')>: negative where the inner step pulls against the outer loss


def metabalance_step(
    model: nn.Module,
    inner_batch: Any,
    outer_batch: Any,
    *,
    inner_lr: float,
    order: int = 2,
    leak: float = 0.0,
    hessian: str = "double_backward",
    scale: float = 1.0,
    loss_fn: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    params: Any = None,
    accumulate: bool = False,
    allow_unused: bool = False,
) -> MetaBalanceResult:
    """Gradient of the outer loss through one inner step, with respect to the parameters before it.

    theta' = theta - inner_lr g_in(theta)
    .grad = scale (g_out(theta') - inner_lr H_in(theta) g_out(theta') + leak g_in(theta))

    Losses are means over their batch. No graph outlives a call: to average over several pairs of batches, call with
    `accumulate=True` and `scale=1/pairs`, and pass `optimizer` with the last pair.

    Args:
        inner_batch, outer_batch, loss_fn, optimizer, accumulate, allow_unused: as for `l2rw_step`.
        inner_lr: learning rate of the inner step.
        order: 2 is the gradient of the equation; 1 omits the Hessian term, as the authors' released code does.
        leak: share of the inner gradient at theta.
        hessian: "double_backward" differentiates the inner gradient once more and is exact, with fused attention and
            bags in their unfused forms. "central_difference" takes two more gradients of the inner batch, at
            theta +- r v with r = sqrt(eps) / |v|; it works with any kernel, and loses half the digits of a gradient.
            If the interval crosses the kink of a ReLU, its error is as large as the jump there: prefer double backward
            in float32. Detached quantities (targets, power iterations) move with the parameters in this form only.
        scale: factor of the whole gradient.
        params: the parameters that the inner step moves; the gradient covers all of them.

    Returns: `MetaBalanceResult(inner_loss [], outer_loss [], alignment [])`.

    Running statistics are updated once each by the inner and the outer batch, as in the released code, but not by the
    passes for the Hessian.

    Raises: as `l2rw_step`; nothing is then changed.

    Source: Bansal et al., MetaBalance: High-Performance Neural Networks for Class-Imbalanced Data, 2021, and its code.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    if hessian not in HESSIANS:
        raise ValueError(f"hessian must be one of {list(HESSIANS)}, got {hessian!r}")
    for name, value in (("inner_lr", inner_lr), ("leak", leak), ("scale", scale)):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    problem = pose(model, inner_batch, outer_batch, loss_fn, params, "reuse", allow_unused=allow_unused)
    require_optimizer(optimizer, problem.trainable)
    with unchanged_on_error(model, problem.writes):
        with gradients_aside(problem.trainable.values()):
            inner = _Inner(problem, differentiable=order == 2 and hessian == "double_backward")
            outer_loss, outer = _outer(problem, inner.gradient, inner_lr)
            alignment = _inner_product(inner.gradient, outer, problem.chosen, outer_loss)
            if not torch.isfinite(alignment):
                raise ValueError("the gradients of inner_batch or outer_batch are not finite although their losses are")
            total = outer
            if order == 2:
                total = _plus(total, inner.times_hessian(outer), -inner_lr)
            if leak:
                total = _plus(total, inner.gradient, leak)
        problem.require_participation({id(problem.trainable[name]) for name in total})
        total = total if scale == 1 else {name: g * scale for name, g in total.items()}
        hand_over(model, problem.trainable, total, optimizer, accumulate)
    return MetaBalanceResult(inner.loss, outer_loss, alignment)


Gradient = Mapping[str, Tensor]


class _Inner:
    """The inner pass at theta: its gradient, and products with its Hessian."""

    def __init__(self, problem: Problem, differentiable: bool) -> None:
        self._problem = problem
        self._start = PassState(problem.model, problem.loss_fn, problem.writes)
        with ExitStack() as stack:
            if differentiable:
                stack.enter_context(twice_differentiable())
            loss = _mean_loss(problem, problem.batch, "inner_batch")
            if differentiable:
                stack.enter_context(differentiable_functions(loss))
            parameters = list(problem.trainable.values())
            found = torch.autograd.grad(loss, parameters, create_graph=differentiable, allow_unused=True)
        self.loss = loss.detach()
        self._graph = {name: g for name, g in zip(problem.trainable, found, strict=True) if g is not None}
        self._differentiable = differentiable
        self.gradient = {name: g.detach() for name, g in self._graph.items()}

    def times_hessian(self, v: Gradient) -> Gradient:
        """d <g_in[chosen], v[chosen]> / dtheta for every trainable parameter; entries that are zero may be missing."""
        names = [name for name in self._problem.chosen if name in v and name in self.gradient]
        moved = named_gradients(names, [v[name] for name in names])
        return self._differentiated(moved) if self._differentiable else self._difference(moved)

    def _differentiated(self, v: Gradient) -> Gradient:
        trainable = self._problem.trainable
        curved = [name for name in v if self._graph[name].requires_grad]
        if not curved:
            return {}
        with twice_differentiable():
            found = torch.autograd.grad(
                [self._graph[name] for name in curved],
                list(trainable.values()),
                [v[name] for name in curved],
                allow_unused=True,
            )
        return {name: g for name, g in zip(trainable, found, strict=True) if g is not None}

    def _difference(self, v: Gradient) -> Gradient:
        norm = float(torch.stack([g.square().sum() for g in v.values()]).sum().sqrt()) if v else 0.0
        if norm == 0:
            return {}
        chosen = self._problem.chosen
        r = torch.finfo(next(iter(v.values())).dtype).eps ** (1 / 2) / norm
        plus, minus = (
            self._gradient_at({name: chosen[name].detach() + s * g for name, g in v.items()}) for s in (r, -r)
        )
        return {name: (g - minus[name]) / (2 * r) for name, g in plus.items()}

    def _gradient_at(self, parameters: Gradient) -> Gradient:
        """Gradient of the same pass, with the same dropout masks, at other parameters."""
        with self._start.replayed(), _moved(self._problem, parameters) as leaves:
            loss = _mean_loss(self._problem, self._problem.batch, "inner_batch")
            return _gradient(self._problem, loss, leaves)


def _outer(problem: Problem, inner: Gradient, lr: float) -> tuple[Tensor, Gradient]:
    """Outer loss and its gradient at theta' in every trainable parameter."""
    moved = {name: p.detach() - lr * inner[name] for name, p in problem.chosen.items() if name in inner}
    with _moved(problem, moved) as leaves:
        loss = _mean_loss(problem, problem.meta_batch, "outer_batch")
        return loss.detach(), _gradient(problem, loss, leaves)


@contextmanager
def _moved(problem: Problem, parameters: Gradient) -> Iterator[dict[str, Tensor]]:
    """The model with some parameters replaced; yields the tensors that it then uses, by parameter name."""
    replaced = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    with substituted(problem.model, {id(problem.trainable[name]): leaf for name, leaf in replaced.items()}):
        yield {**problem.trainable, **replaced}


def _mean_loss(problem: Problem, batch: Any, argument: str) -> Tensor:
    with problem.writes.watching():
        return per_example_losses(problem.model, batch, problem.loss_fn, argument).mean()


def _gradient(problem: Problem, loss: Tensor, leaves: Mapping[str, Tensor]) -> Gradient:
    originals = {name: p for name, p in problem.trainable.items() if leaves[name] is not p}
    found = torch.autograd.grad(loss, [*leaves.values(), *originals.values()], allow_unused=True)
    require_replaced(originals, found[len(leaves) :])
    return {name: g for name, g in zip(leaves, found) if g is not None}


def _inner_product(left: Gradient, right: Gradient, names: Mapping[str, Any], like: Tensor) -> Tensor:
    terms = [(left[name] * right[name]).sum() for name in names if name in left and name in right]
    return torch.stack(terms).sum() if terms else torch.zeros_like(like)


def _plus(left: Gradient, right: Gradient, factor: float) -> Gradient:
    """left + factor * right, where an entry may be missing on either side."""
    total = {name: added(g, factor * right[name]) if name in right else g for name, g in left.items()}
    return {**total, **{name: factor * g for name, g in right.items() if name not in left}}
