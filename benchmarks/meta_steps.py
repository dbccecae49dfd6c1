"""Steps with a second network or a second order: each by differentiating through its virtual step, and by metakern.

All leave the gradient of the model, and that of the second network where there is one, in `.grad`; no optimizer steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import metakern
from benchmarks.cases import Batch, Problem, losses_of, per_example
from benchmarks.gate import EXAMPLES, Shares
from benchmarks.providers import Outcome, Step
from metakern.testing import budget

RATE = 0.1
"""Learning rate of every virtual step."""


class WeightNet(nn.Sequential):
    """One hidden layer of 100 and a sigmoid, on the loss. Source: Shu et al., NeurIPS 2019, section 3."""

    def __init__(self, classes: int) -> None:
        super().__init__(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())


class LabelNet(nn.Module):
    """A distribution over classes from the label alone."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(classes, 64), nn.Linear(64, classes)

    def forward(self, targets: Tensor) -> Tensor:
        return torch.softmax(self.head(torch.tanh(self.embedding(targets))), dim=1)


def published_weight_net(model: nn.Module, network: nn.Module, batch: Batch, meta_batch: Batch) -> None:
    """Virtual step with a graph, meta loss there, gradient to the weight net; a fresh forward and backward."""
    losses = losses_of(model, batch)
    weights = network(losses.detach().unsqueeze(1)).squeeze(1)
    _through_virtual_step(model, network, (weights * losses).sum() / weights.sum(), meta_batch)
    losses = losses_of(model, batch)
    with torch.no_grad():
        weights = network(losses.detach().unsqueeze(1)).squeeze(1)
    ((weights * losses).sum() / weights.sum()).backward()


def published_label_net(model: nn.Module, network: nn.Module, batch: Batch, meta_batch: Batch) -> None:
    """The same for proposed labels."""
    loss = _soft_loss(model(batch[0]), network(batch[1]))
    _through_virtual_step(model, network, loss, meta_batch)
    with torch.no_grad():
        labels = network(batch[1])
    _soft_loss(model(batch[0]), labels).backward()


def published_second_order(model: nn.Module, network: None, batch: Batch, meta_batch: Batch) -> None:
    """One differentiable inner step, then the outer loss backward through it."""
    params = dict(model.named_parameters())
    moved = _moved(params, losses_of(model, batch).mean())
    _loss_at(model, moved, meta_batch).backward()


def _soft_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return -(labels * torch.log_softmax(logits, 1)).sum(1).mean()


def _through_virtual_step(model: nn.Module, network: nn.Module, loss: Tensor, meta_batch: Batch) -> None:
    moved = _moved(dict(model.named_parameters()), loss)
    found = torch.autograd.grad(_loss_at(model, moved, meta_batch), list(network.parameters()))
    for param, grad in zip(network.parameters(), found, strict=True):
        param.grad = grad


def _moved(params: dict[str, nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    return {name: p - RATE * g for (name, p), g in zip(params.items(), grads, strict=True)}


def _loss_at(model: nn.Module, moved: dict[str, Tensor], batch: Batch) -> Tensor:
    return per_example(torch.func.functional_call(model, moved, (batch[0],)), batch[1]).mean()


def _normalised_weights(network: nn.Module, losses: Tensor, targets: Tensor) -> Tensor:
    weights = network(losses.unsqueeze(1)).squeeze(1)
    # d(w_n / S) = dw_n / S - w_n dS / S^2 are two terms that nearly cancel where weights are alike: twice the first.
    return 2 * weights / weights.sum().detach()


def _mean_labels(network: nn.Module, losses: Tensor, targets: Tensor) -> Tensor:
    return network(targets) / len(targets)


def _mwnet(problem: Problem, network: nn.Module, **settings: Any) -> str:
    given = problem.model, network, problem.batch, problem.meta_batch
    return metakern.mwnet_step(*given, weight_optimizer=None, virtual_lr=RATE, **settings).engine


def _mlc(problem: Problem, network: nn.Module, **settings: Any) -> str:
    given = problem.model, network, problem.batch, problem.meta_batch
    return metakern.mlc_step(*given, label_optimizer=None, virtual_lr=RATE, **settings).engine


def _metabalance(problem: Problem, network: None, **settings: Any) -> str:
    metakern.metabalance_step(problem.model, problem.batch, problem.meta_batch, inner_lr=RATE, **settings)
    return settings.get("hessian", "double_backward")


Published = Callable[[nn.Module, Any, Batch, Batch], None]
Ours = Callable[[Problem, Any], str]


@dataclass(frozen=True)
class MetaStep:
    """A step: its second network for so many classes, the sequence of its paper, and metakern's ways to take it.

    `coefficients(network, losses, targets)` are what the network puts before the losses, [n] or [n, C], as large as
    they would be had nothing cancelled: what rounding errors are judged against.
    """

    name: str
    network: Callable[[int], nn.Module] | None
    coefficients: Callable[[nn.Module, Tensor, Tensor], Tensor] | None
    published: Published
    ours: dict[str, Ours]


META_STEPS = [
    MetaStep(
        "mwnet",
        WeightNet,
        _normalised_weights,
        published_weight_net,
        {"metakern": _mwnet, "metakern two_pass": partial(_mwnet, memory="two_pass")},
    ),
    # With `fused` the real step takes the labels of before; with no optimizer step they are the same.
    MetaStep(
        "mlc",
        LabelNet,
        _mean_labels,
        published_label_net,
        {"metakern": _mlc, "metakern fused": partial(_mlc, fused=True)},
    ),
    MetaStep(
        "metabalance",
        None,
        None,
        published_second_order,
        {"metakern": _metabalance, "metakern central_difference": partial(_metabalance, hessian="central_difference")},
    ),
]


def ways(step: MetaStep, problem: Problem, network: nn.Module | None) -> dict[str, Callable[[], Step]]:
    """The plain step, the published sequence, and metakern's."""

    def cleared(run: Callable[[], str]) -> Step:
        def once() -> Outcome:
            for module in (problem.model, network):
                if module is not None:
                    module.zero_grad(set_to_none=True)
            return Outcome(engine=run())

        return once

    def plain() -> str:
        problem.losses(problem.batch).mean().backward()
        return ""

    def published() -> str:
        step.published(problem.model, network, problem.batch, problem.meta_batch)
        return "double_backward"

    ours = {name: lambda way=way: cleared(lambda: way(problem, network)) for name, way in step.ours.items()}
    return {"plain": lambda: cleared(plain), "double_backward (published)": lambda: cleared(published), **ours}


class MetaGate:
    """The truth about one step: the published sequence in float64; what it loses in the working dtype is allowed twice.

    Of each tensor: 2 (error of the published sequence in the working dtype) + 8 eps (size that it would have, had
    nothing cancelled): for the model the norm of its gradient, for the second network, whose gradient is a sum over
    examples that cancels, rate * mean |g_n| * |v| * sum_n |d coefficient_n/d phi|.
    """

    def __init__(self, step: MetaStep, problem: Problem, network: nn.Module | None) -> None:
        self._modules = {"model": problem.model, **({} if network is None else {"network": network})}
        self._truth, self._plain = (
            self._gradients(step, problem, network, dtype) for dtype in (torch.float64, problem.case.dtype)
        )
        self._scale = {name: float(want.norm()) for name, want in self._truth.items()}
        if network is not None and step.coefficients is not None:
            sizes = _sizes(step.coefficients, problem, network)
            self._scale |= {f"network {name}": size for name, size in sizes.items()}

    def judge(self, outcome: Outcome) -> Shares:
        """Share of the budget that the worst tensor uses; a plain step, which has no meta gradient, is not judged."""
        if not outcome.engine:
            return Shares(0.0, 0.0)
        grads = self._named(self._modules)
        return Shares(0.0, max(self._share(name, grad) for name, grad in grads.items()))

    def _share(self, name: str, grad: Tensor | None) -> float:
        if grad is None:
            raise AssertionError(f"no gradient for {name}")
        want = self._truth[name]
        lost = float((self._plain[name].double() - want).abs().max())
        allowed = 2 * lost + budget.CONFIDENCE * torch.finfo(grad.dtype).eps * self._scale[name]
        return budget.verdict(name, grad, want, allowed).share

    def _gradients(
        self, step: MetaStep, problem: Problem, network: nn.Module | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        model, second = (None if module is None else _copy(module, dtype) for module in (problem.model, network))
        batch, meta_batch = _cast(problem.batch, dtype), _cast(problem.meta_batch, dtype)
        step.published(model, second, batch, meta_batch)
        return self._named({"model": model, **({} if second is None else {"network": second})})

    @staticmethod
    def _named(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
        return {f"{kind} {name}": p.grad for kind, module in modules.items() for name, p in module.named_parameters()}


def _sizes(
    coefficients: Callable[[nn.Module, Tensor, Tensor], Tensor], problem: Problem, network: nn.Module
) -> dict[str, float]:
    """rate * mean |g_n| * |v| * sum_n |d coefficient_n/d phi| of each tensor phi of the network, in float64."""
    model, second = _copy(problem.model, torch.float64), _copy(network, torch.float64)
    batch, meta_batch = _cast(problem.batch, torch.float64), _cast(problem.meta_batch, torch.float64)
    chosen = list(range(0, problem.case.n, max(1, problem.case.n // EXAMPLES)))[:EXAMPLES]
    norms = [_norm(model, losses_of(model, (batch[0][k : k + 1], batch[1][k : k + 1])).sum()) for k in chosen]
    meta_norm = _norm(model, losses_of(model, meta_batch).mean())
    losses = losses_of(model, batch).detach()
    found = coefficients(second, losses, batch[1]).flatten()
    total = dict.fromkeys(dict(second.named_parameters()), 0.0)
    for one in found.unbind():
        grads = torch.autograd.grad(one, list(second.parameters()), retain_graph=True)
        for name, grad in zip(total, grads, strict=True):
            total[name] += float(grad.norm())
    return {name: RATE * sum(norms) / len(norms) * meta_norm * size for name, size in total.items()}


def _norm(model: nn.Module, loss: Tensor) -> float:
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return float(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt())


def _copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(module).to(dtype)


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return batch[0].to(dtype) if batch[0].is_floating_point() else batch[0], batch[1]
