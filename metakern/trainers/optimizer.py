"""The optimizer of a run and its learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn

from metakern.trainers.config import TrainConfig


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run for `model`."""
    parameters, decay = model.parameters(), config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, config.lr, weight_decay=decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, config.lr, weight_decay=decay)
    nesterov = config.optimizer == "nesterov"
    return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=decay, nesterov=nesterov)


def rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 .. steps - 1, relative to `config.lr`.

    It rises linearly over the first `--warmup` of the run, and is divided by 10 at each of `--drops`.
    """
    warm = min(1.0, (step + 1) / (config.warmup * steps)) if config.warmup else 1.0
    return warm * 0.1 ** sum(step >= drop * steps for drop in config.drop_shares)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group of `optimizer` to `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
