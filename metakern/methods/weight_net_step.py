"""The step of every method that learns a weight net: `mwnet_step` with a net, its optimizer, and what the net sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import metakern
from metakern.methods.method import Batch, Outcome, Setting

# batch, setting -> further arguments of the weight net beside the losses; or None
Known = Callable[[Batch, Setting], Any]


@dataclass
class WeightNetStep:
    """A step whose weights come from `weight_net(losses[n, 1], *known(batch, setting))`, learned on the meta batch.

    `normalise`, `detach_losses` and `virtual` are those of `metakern.mwnet_step`; the virtual step has the learning
    rate of the run's optimizer. The net is updated in every `every`-th step.
    """

    weight_net: nn.Module
    weight_optimizer: torch.optim.Optimizer
    known: Known | None = None
    normalise: str = "mean"
    detach_losses: bool = True
    virtual: str = "sgd"
    every: int = 1

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        result = metakern.mwnet_step(
            model,
            self.weight_net,
            batch,
            meta_batch,
            weight_optimizer=self.weight_optimizer,
            virtual_lr=None,
            features=None if self.known is None else self.known(batch, setting),
            normalise=self.normalise,
            detach_losses=self.detach_losses,
            virtual=self.virtual,
            update_weight_net=setting.step % self.every == 0,
            optimizer=optimizer,
            engine=setting.engine,
        )
        return Outcome(result.weights, result.losses, result.meta_loss)

    def state_dict(self) -> dict[str, Any]:
        return {"weight_net": self.weight_net.state_dict(), "weight_optimizer": self.weight_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight_net.load_state_dict(state["weight_net"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])


def seeded(make: Callable[[], nn.Module], seed: int, device: torch.device | None = None) -> nn.Module:
    """`make()` with parameters decided by `seed` alone, on `device`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device
