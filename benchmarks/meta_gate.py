"""No number of a meta-step without a green check: each way is held against the published sequence in float64."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import Batch, Problem, losses_of
from benchmarks.gate import EXAMPLES, Shares
from benchmarks.meta_steps import RATE, MetaStep, published
from benchmarks.providers import Outcome
from metakern.testing import budget


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
        allowed = budget.beside_plain(self._plain[name], want, self._scale[name])
        return budget.verdict(name, grad, want, allowed).share

    def _gradients(
        self, step: MetaStep, problem: Problem, network: nn.Module | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        model, second = (None if module is None else _copy(module, dtype) for module in (problem.model, network))
        batch, meta_batch = _cast(problem.batch, dtype), _cast(problem.meta_batch, dtype)
        published(step, model, second, batch, meta_batch)
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
