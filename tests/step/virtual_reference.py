"""Steps with a virtual step written the classic way: differentiate through it twice, with nothing of the library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metakern.testing import budget, inputs
from metakern.testing.models import Transformer

Batch = tuple[Tensor, Tensor]


def convolutional(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Without biases before the norms: batch statistics take them out, and Adam has no derivative at gradient zero."""
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1, bias=False), norm(6), nn.ReLU()),
        *(nn.Conv2d(6, 4, 3, stride=2, bias=False), norm(4), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(16, 3)),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)),
    "group-norm": lambda: convolutional(lambda channels: nn.GroupNorm(2, channels)),
    "batch-norm": lambda: convolutional(nn.BatchNorm2d),
    "transformer": lambda: Transformer(width=8, depth=1, heads=2, classes=3, vocabulary=11),
}


def make(name: str, n: int = 6, m: int = 4, seed: int = 0) -> tuple[nn.Module, Batch, Batch]:
    """A model in float64 and train mode, a train batch and a meta batch."""
    torch.manual_seed(seed)
    model = MODELS[name]().double()
    if name == "transformer":
        train, meta = (inputs.labels(size, 5, classes=11, seed=seed + 10 + size) for size in (n, m))
        return model, (train, inputs.labels(n, classes=3, seed=1)), (meta, inputs.labels(m, classes=3, seed=2))
    shape = (5,) if name == "mlp" else (2, 6, 6)
    batch, meta_batch = inputs.pair(n, m, *shape, classes=3, seed=seed)
    return model, batch, meta_batch


class WeightNet(nn.Module):
    """loss [n, 1] and any number of feature tensors [n, k] -> weight [n, 1] in (0, 1)."""

    def __init__(self, features: int = 0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1 + features, 5), nn.Tanh(), nn.Linear(5, 1), nn.Sigmoid())

    def forward(self, losses: Tensor, *features: Tensor) -> Tensor:
        return self.net(torch.cat([losses, *features], 1))


def losses_at(model: nn.Module, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
    """Per-example cross entropy at any parameters; running statistics are left alone."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits = functional_call(model, {**parameters, **buffers}, (batch[0],))
    return F.cross_entropy(logits, batch[1], reduction="none")


def update(rule: str, p: Tensor, g: Tensor, group: dict[str, Any], state: Any, lr: float) -> Tensor:
    """One parameter after a step of torch.optim's rules, differentiable in its gradient."""
    if rule == "sgd":
        return p - lr * g
    if rule in ("momentum", "nesterov"):
        g = g + group["weight_decay"] * p
        held = state.get("momentum_buffer")
        buffer = g if held is None else group["momentum"] * held + (1 - group["dampening"]) * g
        return p - lr * (g + group["momentum"] * buffer if rule == "nesterov" else buffer)
    (b1, b2), t = group["betas"], float(state.get("step", 0)) + 1
    if group.get("decoupled_weight_decay"):
        p = p * (1 - lr * group["weight_decay"])
    else:
        g = g + group["weight_decay"] * p
    first = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    second = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * (g.detach() if rule == "adam_frozen" else g) ** 2
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        second = torch.maximum(second, state["max_exp_avg_sq"])
    second = second / (1 - b2**t)
    root = torch.where(second > 0, second, 1.0).sqrt() * (second > 0)  # sqrt has no derivative at zero
    return p - lr * (first / (1 - b1**t)) / (root + group["eps"])


def moved(
    rule: str,
    parameters: dict[str, Tensor],
    gradient: dict[str, Tensor],
    lr: float,
    optimizer: torch.optim.Optimizer | None,
    model: nn.Module,
) -> dict[str, Tensor]:
    """theta^ with its graph."""
    own = dict(model.named_parameters())
    groups = {} if optimizer is None else {p: group for group in optimizer.param_groups for p in group["params"]}
    states = {} if optimizer is None else optimizer.state
    return {
        name: update(rule, p, gradient[name], groups.get(own[name], {}), states.get(own[name], {}), lr)
        if name in gradient
        else p
        for name, p in parameters.items()
    }


def normalised(weights: Tensor, normalise: str) -> Tensor:
    return (
        weights
        / {
            "sum": weights.sum(),
            "detached_sum": weights.sum().detach(),
            "mean": torch.tensor(len(weights)),
            "none": torch.tensor(1),
        }[normalise]
    )


def mwnet_reference(
    model: nn.Module,
    weight_net: nn.Module,
    batch: Batch,
    meta_batch: Batch,
    *,
    weight_optimizer: torch.optim.Optimizer,
    virtual_lr: float,
    features: tuple[Tensor, ...] = (),
    normalise: str = "sum",
    detach_losses: bool = True,
    virtual: str = "sgd",
    optimizer: torch.optim.Optimizer | None = None,
    names: set[str] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, losses and meta loss of a whole step by double backward; steps what it is given optimizers for."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    chosen = {name: p for name, p in parameters.items() if names is None or name in names}
    losses = losses_at(model, parameters, batch)
    seen = losses.detach() if detach_losses else losses
    weights = normalised(weight_net(seen[:, None], *features).flatten(), normalise)
    total = (weights * losses).sum()
    gradient = dict(zip(chosen, torch.autograd.grad(total, list(chosen.values()), create_graph=True), strict=True))
    virtual_parameters = moved(virtual, parameters, gradient, virtual_lr, optimizer, model)
    meta_loss = losses_at(model, virtual_parameters, meta_batch).mean()
    for p, g in zip(
        weight_net.parameters(), torch.autograd.grad(meta_loss, list(weight_net.parameters())), strict=True
    ):
        p.grad = g
    weight_optimizer.step()

    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    with torch.no_grad():
        weights = normalised(weight_net(losses[:, None], *features).flatten(), normalise)
    model.zero_grad()
    (weights * losses).sum().backward()
    if optimizer is not None:
        optimizer.step()
    return weights, losses.detach(), meta_loss.detach()


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def assert_same(got: nn.Module, want: nn.Module, name: str, scale: float = 1.0) -> None:
    """Parameters, gradients and buffers of two copies of a network."""
    for (key, left), (_, right) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        close(left, right, f"{name} {key}", scale)
        assert (left.grad is None) == (right.grad is None), f"{name} {key}: .grad is missing or should not be there"
        if left.grad is not None and right.grad is not None:
            close(left.grad, right.grad, f"gradient of {name} {key}", scale)
    for (key, left), (_, right) in zip(got.named_buffers(), want.named_buffers(), strict=True):
        close(left, right, f"{name} buffer {key}", scale)


def close(got: Tensor, want: Tensor, name: str, scale: float = 1.0) -> None:
    """Equal in float64, relative to the largest entry of a tensor and to 1."""
    largest = 1 + float(want.detach().abs().max())
    budget.assert_within(got.detach(), want.detach(), scale * largest, dtype=torch.float64, name=name)
