"""Virtual steps: where a step with gradient G would take the parameters, and how that depends on G.

theta^ = theta - update(G). Every rule here acts on each entry by itself, so J = d update / dG is a diagonal, and
d meta_loss(theta^) / dG = -J g_meta(theta^). Source of the formulas: the update rules of torch.optim, differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.state import unchanged_buffers
from metakern.engines.problem import Problem
from metakern.engines.substitution import substituted

Diagonal = float | Tensor


class VirtualStep(NamedTuple):
    """theta^ by parameter name, and the diagonal of J by parameter name."""

    parameters: dict[str, Tensor]
    jacobian: dict[str, Diagonal]

    def pulled_back(self, meta_gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """v = J g_meta, the direction that the dots are taken along."""
        return {name: g * self.jacobian[name] for name, g in meta_gradient.items()}


Group = dict[str, Any]
State = Mapping[str, Any]
Rule = Callable[[Tensor, Tensor, float, Group, State], tuple[Tensor, Diagonal]]


def _sgd(p: Tensor, grad: Tensor, lr: float, group: Group, state: State) -> tuple[Tensor, Diagonal]:
    return p - lr * grad, lr


def _with_momentum(p: Tensor, grad: Tensor, group: Group, state: State) -> tuple[Tensor, Tensor, float]:
    """Gradient with weight decay, momentum buffer after the step, and how much of the gradient enters the buffer."""
    grad = grad.add(p, alpha=group["weight_decay"])
    buffer = state.get("momentum_buffer")
    if buffer is None or group["momentum"] == 0:
        return grad, grad, 1.0
    share = 1 - group["dampening"]
    return grad, group["momentum"] * buffer + share * grad, share


def _momentum(p: Tensor, grad: Tensor, lr: float, group: Group, state: State) -> tuple[Tensor, Diagonal]:
    _, buffer, share = _with_momentum(p, grad, group, state)
    return p - lr * buffer, lr * share


def _nesterov(p: Tensor, grad: Tensor, lr: float, group: Group, state: State) -> tuple[Tensor, Diagonal]:
    grad, buffer, share = _with_momentum(p, grad, group, state)
    mu = group["momentum"]
    return p - lr * (grad + mu * buffer), lr * (1 + mu * share)


def _adam(
    p: Tensor, grad: Tensor, lr: float, group: Group, state: State, frozen: bool = False
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


def _adam_frozen(p: Tensor, grad: Tensor, lr: float, group: Group, state: State) -> tuple[Tensor, Diagonal]:
    return _adam(p, grad, lr, group, state, frozen=True)


_RULES: dict[str, tuple[Rule, type[torch.optim.Optimizer] | tuple[type[torch.optim.Optimizer], ...] | None]] = {
    "sgd": (_sgd, None),
    "momentum": (_momentum, torch.optim.SGD),
    "nesterov": (_nesterov, torch.optim.SGD),
    "adam": (_adam, (torch.optim.Adam, torch.optim.AdamW)),
    "adam_frozen": (_adam_frozen, (torch.optim.Adam, torch.optim.AdamW)),
}


def require_virtual(
    rule: str, lr: float | None, optimizer: torch.optim.Optimizer | None, chosen: Mapping[str, nn.Parameter]
) -> None:
    """Raise unless the rule is known, and what it reads (learning rate, optimizer of the right kind) is there."""
    if rule not in _RULES:
        raise ValueError(f"virtual must be one of {list(_RULES)}, got {rule!r}")
    kind = _RULES[rule][1]
    if kind is not None and not isinstance(optimizer, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(
            f"virtual={rule!r} reads the state of optimizer, which must be {names}; got {type(optimizer).__name__}"
        )
    if lr is None and optimizer is None:
        raise ValueError("virtual_lr is None, which takes the learning rate of optimizer, but there is no optimizer")
    if lr is not None and not (isinstance(lr, (int, float)) and math.isfinite(lr)):
        raise ValueError(f"virtual_lr must be a finite number or None, got {lr!r}")
    if kind is not None or lr is None:
        assert optimizer is not None
        _require_held(optimizer, chosen)


def _require_held(optimizer: torch.optim.Optimizer, chosen: Mapping[str, nn.Parameter]) -> None:
    groups = _groups(optimizer)
    for name, p in chosen.items():
        if id(p) not in groups:
            raise ValueError(f"optimizer does not hold parameter '{name}', so its virtual step is not defined")
        if groups[id(p)].get("maximize"):
            raise NotImplementedError("virtual steps descend; this optimizer has maximize=True")


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, Group]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


@torch.no_grad()
def virtual_step(
    rule: str,
    lr: float | None,
    optimizer: torch.optim.Optimizer | None,
    chosen: Mapping[str, nn.Parameter],
    gradient: Mapping[str, Tensor],
) -> VirtualStep:
    """theta^ and J for the chosen parameters; neither parameters nor optimizer are changed.

    `lr=None` takes the learning rate of each parameter's group of `optimizer`.
    """
    function, _ = _RULES[rule]
    groups = {} if optimizer is None else _groups(optimizer)
    parameters: dict[str, Tensor] = {}
    jacobian: dict[str, Diagonal] = {}
    for name, p in chosen.items():
        group = groups.get(id(p), {})
        state = {} if optimizer is None else optimizer.state.get(p, {})
        rate = float(group["lr"]) if lr is None else lr
        parameters[name], jacobian[name] = function(p.detach(), gradient[name], rate, group, state)
    return VirtualStep(parameters, jacobian)


def meta_gradient_at(problem: Problem, parameters: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean meta loss at other parameters, and its gradient there, by one plain forward and backward pass.

    Model, parameters and buffers are not touched; a parameter that the meta loss does not depend on has no entry.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    replacement = {id(problem.chosen[name]): leaf for name, leaf in leaves.items()}
    # The backward pass runs inside as well: checkpointed layers run their forward pass again there.
    with unchanged_buffers(problem.model), substituted(problem.model, replacement):
        meta_loss = problem.meta_losses().mean()
        found = torch.autograd.grad(meta_loss, list(leaves.values()), allow_unused=True)
    return meta_loss.detach(), {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
