"""Penultimate features: the input of a model's last linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metakern.methods.plain_training import evaluating


def last_linear(model: nn.Module) -> nn.Linear:
    """The last `nn.Linear` in the order of the modules, which is assumed to compute the logits.

    Raises: ValueError if there is none.
    """
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ValueError(f"features: {type(model).__name__} has no nn.Linear, so it has no penultimate features")
    return found[-1]


@contextmanager
def kept_features(model: nn.Module) -> Iterator[Callable[[nn.Module, Any], Tensor]]:
    """Within the block, a function (model, batch) -> features[n, d] of the model's latest forward pass, as constants.

    `mwnet_step` and `mlc_step` accept it as `features=`. It needs no forward pass of its own.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept[:] = [arguments[0].detach()]

    hook = last_linear(model).register_forward_pre_hook(keep)
    try:
        yield lambda model, batch: kept[0].flatten(1)
    finally:
        hook.remove()


@contextmanager
def kept_logits(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Within the block, a function () -> the output of the model's latest forward pass, as a constant."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        kept[:] = [output.detach()]

    hook = model.register_forward_hook(keep)
    try:
        yield lambda: kept[0]
    finally:
        hook.remove()


@torch.no_grad()
def features(model: nn.Module, inputs: Tensor, *, batch_size: int = 500) -> Tensor:
    """The penultimate features of inputs[n, ...] in evaluation mode, [n, d]; the mode of the model is restored."""
    parts = []
    with evaluating(model), kept_features(model) as kept:
        for part in inputs.split(batch_size):
            model(part)
            parts.append(kept(model, part))
    return torch.cat(parts)
