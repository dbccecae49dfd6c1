"""Steps with a second network or a second order: the sequence of their paper, and metakern's ways to take them.

All leave the gradient of the model, and that of the second network where there is one, in `.grad`; no optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import metakern
from benchmarks.cases import Batch, Problem, losses_of, per_example

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


Network = Callable[[Tensor], Tensor]
Run = Callable[[], str]
"""Takes a step; says by which engine."""
Way = Callable[[Problem, Any], Run]


@dataclass(frozen=True)
class MetaStep:
    """A step: its second network for so many classes, its losses, and metakern's ways to take it.

    Virtual and real step descend `loss(outputs(model, batch), network, targets)`. `coefficients(network, losses,
    targets)` are what the network puts before the losses, [n] or [n, C], as large as they would be had nothing
    cancelled: what rounding errors are judged against.
    """

    name: str
    network: Callable[[int], nn.Module] | None
    coefficients: Callable[[nn.Module, Tensor, Tensor], Tensor] | None
    outputs: Callable[[nn.Module, Batch], Tensor]
    loss: Callable[[Tensor, Any, Tensor], Tensor]
    ours: dict[str, Way]
    compiled: dict[str, Way] = field(default_factory=dict)


def published(step: MetaStep, model: nn.Module, network: Any, batch: Batch, meta_batch: Batch) -> None:
    """Virtual step with a graph, meta loss there, gradient to the second network; a fresh forward and backward.

    Without a second network the meta loss goes backward to the model, and that is all.
    """
    params = dict(model.named_parameters())
    loss = step.loss(step.outputs(model, batch), network, batch[1])
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    moved = {name: p - RATE * g for (name, p), g in zip(params.items(), grads, strict=True)}
    meta_loss = loss_at(model, moved, meta_batch)
    if network is None:
        meta_loss.backward()
    else:
        leave_gradient(network, torch.autograd.grad(meta_loss, list(network.parameters())))
        step.loss(step.outputs(model, batch), constant(network), batch[1]).backward()


def loss_at(model: nn.Module, moved: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The mean loss at other parameters."""
    return per_example(torch.func.functional_call(model, dict(moved), (batch[0],)), batch[1]).mean()


def leave_gradient(network: nn.Module, found: tuple[Tensor, ...]) -> None:
    for param, grad in zip(network.parameters(), found, strict=True):
        param.grad = grad


def constant(network: nn.Module) -> Network:
    """The network where the loss of the real step asks it."""

    def ask(given: Tensor) -> Tensor:
        with torch.no_grad():
            return network(given)

    return ask


def _weighted_mean(losses: Tensor, network: Network, targets: Tensor) -> Tensor:
    weights = network(losses.detach().unsqueeze(1)).squeeze(1)
    return (weights * losses).sum() / weights.sum()


def _soft_loss(logits: Tensor, network: Network, targets: Tensor) -> Tensor:
    return -(network(targets) * torch.log_softmax(logits, 1)).sum(1).mean()


def _mean(losses: Tensor, network: None, targets: Tensor) -> Tensor:
    return losses.mean()


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0])


def _normalised_weights(network: nn.Module, losses: Tensor, targets: Tensor) -> Tensor:
    weights = network(losses.unsqueeze(1)).squeeze(1)
    # d(w_n / S) = dw_n / S - w_n dS / S^2 are two terms that nearly cancel where weights are alike: twice the first.
    return 2 * weights / weights.sum().detach()


def _mean_labels(network: nn.Module, losses: Tensor, targets: Tensor) -> Tensor:
    return network(targets) / len(targets)


def _mwnet(problem: Problem, network: nn.Module, **settings: Any) -> Run:
    given = problem.model, network, problem.batch, problem.meta_batch
    return lambda: metakern.mwnet_step(*given, weight_optimizer=None, virtual_lr=RATE, **settings).engine


def _mwnet_compiled(problem: Problem, network: nn.Module) -> Run:
    batches = problem.batch, problem.meta_batch
    step = metakern.compile_mwnet_step(problem.model, network, *batches, weight_optimizer=None, virtual_lr=RATE)
    return lambda: step(*batches).engine


def _mlc(problem: Problem, network: nn.Module, **settings: Any) -> Run:
    given = problem.model, network, problem.batch, problem.meta_batch
    return lambda: metakern.mlc_step(*given, label_optimizer=None, virtual_lr=RATE, **settings).engine


def _mlc_compiled(problem: Problem, network: nn.Module, **settings: Any) -> Run:
    given = problem.model, network, problem.batch, problem.meta_batch
    step = metakern.compile_mlc_step(*given, label_optimizer=None, virtual_lr=RATE, **settings)
    return lambda: step(problem.batch, problem.meta_batch).engine


def _metabalance(problem: Problem, network: None, hessian: str = "double_backward") -> Run:
    def run() -> str:
        metakern.metabalance_step(problem.model, problem.batch, problem.meta_batch, inner_lr=RATE, hessian=hessian)
        return hessian

    return run


META_STEPS = [
    MetaStep(
        "mwnet",
        WeightNet,
        _normalised_weights,
        losses_of,
        _weighted_mean,
        {"metakern": _mwnet, "metakern two_pass": partial(_mwnet, memory="two_pass")},
        {"metakern compiled": _mwnet_compiled},
    ),
    # With `fused` the real step takes the labels of before; with no optimizer step they are the same.
    MetaStep(
        "mlc",
        LabelNet,
        _mean_labels,
        _logits,
        _soft_loss,
        {"metakern": _mlc, "metakern fused": partial(_mlc, fused=True)},
        {"metakern compiled": _mlc_compiled, "metakern fused compiled": partial(_mlc_compiled, fused=True)},
    ),
    MetaStep(
        "metabalance",
        None,
        None,
        losses_of,
        _mean,
        {"metakern": _metabalance, "metakern central_difference": partial(_metabalance, hessian="central_difference")},
    ),
]
