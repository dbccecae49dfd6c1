"""Virtual steps: where a step with gradient G would take the parameters, and how that depends on G.

theta^ = theta - update(G). Every rule here acts on each entry separately, so J = d update / dG is diagonal, and
d meta_loss(theta^) / dG = -J g_meta(theta^). Source of the formulas: the update rules of torch.optim, differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Rate = float | Tensor
"""A number, or a tensor []."""

Diagonal = float | Tensor


class VirtualStep(NamedTuple):
    """theta^ by parameter name, and the diagonal of J by parameter name."""

    parameters: dict[str, Tensor]
    jacobian: dict[str, Diagonal]

    def pulled_back(self, meta_gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        """v = J g_meta, the direction of the dots; the dict is emptied to free memory."""
        return {name: meta_gradient.pop(name) * self.jacobian[name] for name in list(meta_gradient)}


Group = dict[str, Any]
State = Mapping[str, Any]
Rule = Callable[[Tensor, Tensor, Rate, Group, State], tuple[Tensor, Diagonal]]


def _descended(p: Tensor, change: Tensor, lr: Rate) -> Tensor:
    """p - lr change. In a compiled step lr is a tensor, whose value may change from run to run."""
    return p - lr * change if isinstance(lr, Tensor) else torch.sub(p, change, alpha=lr)


def _sgd(p: Tensor, grad: Tensor, lr: Rate, group: Group, state: State) -> tuple[Tensor, Diagonal]:
    return _descended(p, grad, lr), lr


def _with_momentum(p: Tensor, grad: Tensor, group: Group, state: State) -> tuple[Tensor, Tensor, float]:
    """Gradient with weight decay, momentum buffer after the step, and how much of the gradient enters the buffer."""
    grad = grad.add(p, alpha=group["weight_decay"])
    buffer = state.get("momentum_buffer")
    if buffer is None or group["momentum"] == 0:
        return grad, grad, 1.0
    share = 1 - group["dampening"]
    return grad, (share * grad).add_(buffer, alpha=group["momentum"]), share  # sparse embeddings have a sparse buffer


def _momentum(p: Tensor, grad: Tensor, lr: Rate, group: Group, state: State) -> tuple[Tensor, Diagonal]:
    _, buffer, share = _with_momentum(p, grad, group, state)
    return _descended(p, buffer, lr), lr * share


def _nesterov(p: Tensor, grad: Tensor, lr: Rate, group: Group, state: State) -> tuple[Tensor, Diagonal]:
    grad, buffer, share = _with_momentum(p, grad, group, state)
    mu = group["momentum"]
    return _descended(p, grad.add(buffer, alpha=mu), lr), lr * (1 + mu * share)


def _adam(
    p: Tensor, grad: Tensor, lr: Rate, group: Group, state: State, frozen: bool = False
) -> tuple[Tensor, Diagonal]:
    beta1, beta2 = group["betas"]
    if group.get("decoupled_weight_decay"):
        p = p * (1 - lr * group["weight_decay"])
    else:
        grad = grad.add(p, alpha=group["weight_decay"])
    step = float(state.get("step", 0)) + 1
    first, second = state.get("exp_avg", torch.zeros_like(p)), state.get("exp_avg_sq", torch.zeros_like(p))
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad * grad
    moves = second > 0  # where the second moment depends on G: at G = 0 with empty moments the slope is 1 / eps
    if group["amsgrad"]:
        largest = state.get("max_exp_avg_sq", torch.zeros_like(p))
        moves &= second > largest
        second = torch.maximum(second, largest)
    rate = lr / (1 - beta1**step)
    correction = math.sqrt(1 - beta2**step)
    root = second.sqrt()
    denominator = root / correction + group["eps"]
    jacobian = rate * (1 - beta1) / denominator
    if not frozen:
        slope = torch.where(moves, (1 - beta2) * grad / (root * correction), 0.0)
        jacobian = jacobian - rate * first * slope / denominator.square()
    return p - rate * first / denominator, jacobian


def _adam_frozen(p: Tensor, grad: Tensor, lr: Rate, group: Group, state: State) -> tuple[Tensor, Diagonal]:
    return _adam(p, grad, lr, group, state, frozen=True)


class _RuleEntry(NamedTuple):
    function: Rule
    optimizers: tuple[type[torch.optim.Optimizer], ...]  # whose state it reads
    affine: bool  # theta^ is affine in the gradient, so J is a number that does not depend on it


_RULES = {
    "sgd": _RuleEntry(_sgd, (), True),
    "momentum": _RuleEntry(_momentum, (torch.optim.SGD,), True),
    "nesterov": _RuleEntry(_nesterov, (torch.optim.SGD,), True),
    "adam": _RuleEntry(_adam, (torch.optim.Adam, torch.optim.AdamW), False),
    "adam_frozen": _RuleEntry(_adam_frozen, (torch.optim.Adam, torch.optim.AdamW), False),
}


@dataclass(frozen=True)
class VirtualRule:
    """How a virtual step moves: a rule by name, its learning rate, and the optimizer whose current state it reads.

    `lr=None` takes the learning rate of each parameter's group of `optimizer`.
    """

    name: str
    lr: Rate | None
    optimizer: torch.optim.Optimizer | None
    group_rates: tuple[Tensor, ...] = ()  # used in a compiled step instead of the groups' own rates

    def require_usable(self, chosen: Mapping[str, nn.Parameter]) -> None:
        """Raise unless the rule is known, and what it reads exists for every chosen parameter."""
        if self.name not in _RULES:
            raise ValueError(f"virtual must be one of {list(_RULES)}, got {self.name!r}")
        kinds = _RULES[self.name].optimizers
        if kinds and not isinstance(self.optimizer, kinds):
            raise TypeError(
                f"virtual={self.name!r} reads the state of optimizer, which must be "
                f"{' or '.join(kind.__name__ for kind in kinds)}; got {type(self.optimizer).__name__}"
            )
        if self.lr is None and self.optimizer is None:
            raise ValueError("virtual_lr=None takes the learning rate of optimizer, but there is no optimizer")
        if self.lr is not None and not (isinstance(self.lr, (int, float)) and math.isfinite(self.lr)):
            raise ValueError(f"virtual_lr must be a finite number or None, got {self.lr!r}")
        if self.optimizer is not None and self.reads_groups:
            _require_held(self.optimizer, chosen)

    @property
    def affine(self) -> bool:
        return _RULES[self.name].affine

    @property
    def reads_state(self) -> bool:
        """Whether it reads the optimizer's state."""
        return bool(_RULES[self.name].optimizers)

    @property
    def reads_groups(self) -> bool:
        """Whether it matters which parameters are in which group of the optimizer."""
        return self.reads_state or self.lr is None

    def rates(self) -> list[float]:
        """The learning rate, or that of every group of the optimizer."""
        if self.lr is not None or self.optimizer is None:
            return [] if self.lr is None else [float(self.lr)]
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def at(self, rates: Sequence[Tensor]) -> VirtualRule:
        """The same rule with these learning rates, tensors []."""
        if self.lr is not None:
            return replace(self, lr=rates[0])
        return replace(self, group_rates=tuple(rates))

    @torch.no_grad()
    def step(self, chosen: Mapping[str, nn.Parameter], gradient: Mapping[str, Tensor]) -> VirtualStep:
        """theta^ and J for the parameters that have a gradient, since optimizers skip the others; changes neither
        parameters nor optimizer.
        """
        groups = self._groups()
        parameters: dict[str, Tensor] = {}
        jacobian: dict[str, Diagonal] = {}
        for name, p in chosen.items():
            if name not in gradient:
                continue
            group = groups.get(id(p), {})
            state = {} if self.optimizer is None else self.optimizer.state.get(p, {})
            grad = gradient[name].to_dense() if gradient[name].is_sparse else gradient[name]
            parameters[name], jacobian[name] = _RULES[self.name].function(
                p.detach(), grad, self._rate(group), group, state
            )
        return VirtualStep(parameters, jacobian)

    def origin(self, chosen: Mapping[str, nn.Parameter]) -> VirtualStep:
        """theta^ at gradient zero, from which an affine rule moves by -J times the gradient; theta itself for "sgd"."""
        if self.name != "sgd":
            return self.step(chosen, {name: p.new_zeros(()).expand_as(p) for name, p in chosen.items()})
        groups = self._groups()
        return VirtualStep(dict(chosen), {name: self._rate(groups.get(id(p), {})) for name, p in chosen.items()})

    def _groups(self) -> dict[int, Group]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        rates = self.group_rates or [group["lr"] for group in groups]
        return {id(p): {**group, "lr": rate} for group, rate in zip(groups, rates) for p in group["params"]}

    def _rate(self, group: Group) -> Rate:
        if self.lr is not None:
            return self.lr
        return group["lr"] if self.group_rates else float(group["lr"])


def _require_held(optimizer: torch.optim.Optimizer, chosen: Mapping[str, nn.Parameter]) -> None:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in chosen.items():
        if id(p) not in groups:
            raise ValueError(f"optimizer does not hold parameter '{name}', so its virtual step is not defined")
        if groups[id(p)].get("maximize"):
            raise NotImplementedError("virtual steps descend; this optimizer has maximize=True")
