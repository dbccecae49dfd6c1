"""The step of all methods with a weight net: `mwnet_step` with the net, its optimizer, and what the net sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import metakern
from metakern.methods.method import Batch, Outcome, Setting, WeightingFunction


@dataclass
class WeightNetStep:
    """A step whose weights come from `weight_net(losses[n, 1], *features)`, which learns on the meta batch.

    `normalise`, `detach_losses`, `virtual` and the `features` of a call are those of `metakern.mwnet_step`; virtual
    "own" is the rule of the run's optimizer, whose learning rate the virtual step always has. The weight net learns in
    one of `every` steps.
    """

    weight_net: nn.Module
    weight_optimizer: torch.optim.Optimizer
    normalise: str = "mean"
    detach_losses: bool = True
    virtual: str = "sgd"
    every: int = 1

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        meta_batch: Batch,
        *,
        optimizer: torch.optim.Optimizer,
        setting: Setting,
        features: Any = None,
    ) -> Outcome:
        result = metakern.mwnet_step(
            model,
            self.weight_net,
            batch,
            meta_batch,
            weight_optimizer=self.weight_optimizer,
            virtual_lr=None,
            features=features,
            normalise=self.normalise,
            detach_losses=self.detach_losses,
            virtual=virtual_rule(optimizer) if self.virtual == "own" else self.virtual,
            update_weight_net=setting.step % self.every == 0,
            optimizer=optimizer,
            engine=setting.engine,
        )
        return Outcome(result.weights, result.losses, result.meta_loss)

    def weighting_function(self) -> WeightingFunction:
        return weights_over_losses(self.weight_net, {"weight": ()})

    def state_dict(self) -> dict[str, Any]:
        return {"weight_net": self.weight_net.state_dict(), "weight_optimizer": self.weight_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight_net.load_state_dict(state["weight_net"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])


def weights_over_losses(weight_net: nn.Module, features: Mapping[str, tuple[Tensor, ...]]) -> WeightingFunction:
    """The net's weights for losses from 0 to 5; one curve for each of `features`, each given for a single example."""
    losses = torch.linspace(0, 5, 101, device=device_of(weight_net)).unsqueeze(1)
    return _weights_over("loss", weight_net, (losses,), features)


def weights_over_curves(
    weight_net: nn.Module, length: int, features: Mapping[str, tuple[Tensor, ...]]
) -> WeightingFunction:
    """The weights of a net that sees (losses, curves, *features), for curves at a constant distance from the mean.

    The mean is that of the class. One curve of weights for each of `features`, which are given for a single example.
    """
    above = torch.linspace(-2.5, 2.5, 101, device=device_of(weight_net), dtype=next(weight_net.parameters()).dtype)
    seen = above.unsqueeze(1), above.unsqueeze(1).expand(101, length)
    return _weights_over("loss above the mean of the class, in every epoch", weight_net, seen, features)


@torch.no_grad()
def _weights_over(
    quantity: str, weight_net: nn.Module, seen: tuple[Tensor, ...], features: Mapping[str, tuple[Tensor, ...]]
) -> WeightingFunction:
    """The net's weights for each row of `seen`, whose first entry, [k, 1], is the quantity."""
    at = seen[0].flatten()
    weights = {
        name: weight_net(*seen, *(value.expand(len(at), *value.shape[1:]) for value in own)).flatten().cpu()
        for name, own in features.items()
    }
    return WeightingFunction(quantity, at.cpu(), weights)


def seeded(make: Callable[[], nn.Module], seed: int, device: torch.device | None = None) -> nn.Module:
    """`make()` with parameters determined by `seed` alone, on `device`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def virtual_rule(optimizer: torch.optim.Optimizer) -> str:
    """The `virtual=` of `mwnet_step` that follows `optimizer`; plain SGD for an optimizer that it does not know."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return "adam_frozen"
    if isinstance(optimizer, torch.optim.SGD):
        group = optimizer.param_groups[0]
        return "nesterov" if group["nesterov"] else "momentum" if group["momentum"] else "sgd"
    return "sgd"
