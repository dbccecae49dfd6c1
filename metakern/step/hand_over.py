"""Give a gradient to the parameters and, if there is one, let a torch optimizer step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def require_optimizer(optimizer: torch.optim.Optimizer | None, trainable: Mapping[str, nn.Parameter]) -> None:
    """Raise unless `optimizer` is None or a torch optimizer of at least one trainable parameter of the model."""
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in trainable.values()):
        raise ValueError("optimizer holds none of the model's trainable parameters; build it from model.parameters()")


def hand_over(
    trainable: Mapping[str, nn.Parameter],
    gradient: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    accumulate: bool,
) -> None:
    """Leave `gradient` in `.grad`, replacing what is there or added to it, and step if there is an optimizer."""
    for name, p in trainable.items():
        if accumulate and p.grad is not None:
            p.grad = p.grad + gradient[name]
        else:
            p.grad = gradient[name]
    if optimizer is not None:
        optimizer.step()
