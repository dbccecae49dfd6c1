"""MAML: initial parameters from which a few steps on a support set lead to a good classifier.

With one inner step, the gradient is that of `metakern.metabalance_step`. MAML takes several steps and differentiates
through all of them, so the graph grows with their number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakern.data import Examples


def adapted(
    model: nn.Module,
    support: Examples,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    lr: float,
    order: int = 2,
) -> dict[str, Tensor]:
    """theta_{j+1} = theta_j - lr d loss(support; theta_j) / d theta_j, for j < steps, from the model's parameters.

    The result, by name, has a graph back to the model's parameters: with order 2 also through the gradients, with order
    1 the gradients are constants. The model itself is not changed.

    Args:
        loss: logits[n, K], targets[n] -> [].

    Raises: ValueError if order is not 1 or 2, steps is below 0, or the model has no trainable parameter.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017,
    algorithm 2; order 1: its section 5.2.
    """
    if order not in (1, 2):
        raise ValueError(f"adapted: order must be 1 or 2, got {order!r}")
    if steps < 0:
        raise ValueError(f"adapted: steps must be at least 0, got {steps}")
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"adapted: {type(model).__name__} has no trainable parameter")
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH) if order == 2 else nullcontext(), torch.enable_grad():
        for _ in range(steps):
            value = loss(functional_call(model, parameters, (support.inputs,)), support.targets)
            found = torch.autograd.grad(value, list(parameters.values()), create_graph=order == 2, allow_unused=True)
            parameters = {
                name: p if gradient is None else p - lr * gradient
                for (name, p), gradient in zip(parameters.items(), found, strict=True)
            }
    return parameters
