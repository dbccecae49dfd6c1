"""Models and optimizers that a compiled step of two networks must cope with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def drawing_model() -> nn.Module:
    """With running statistics and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3)
    ).double()


class Worn(torch.optim.SGD):
    """Its steps move the bias of a network by a lot, after which it is another function."""

    def __init__(self, net: nn.Module, by: float) -> None:
        super().__init__(net.parameters(), lr=0.01)
        self.net, self.by = net, by

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().step()
        with torch.no_grad():
            self.net.bias.add_(self.by)  # pyright: ignore


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise OSError("no step today")
