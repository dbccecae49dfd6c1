"""Models and optimizers that a step must cope with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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


class Dropped(nn.Module):
    """Of three layers one is left out: that of `dropped`, or of what `by_size` says for the number of examples."""

    def __init__(self, by_size: Mapping[int, int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)
        self.dropped, self.by_size = 1, dict(by_size or {})
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.by_size.get(len(x), self.dropped)
        for k, layer in enumerate(self.layers):
            x = x if k == dropped else torch.tanh(layer(x))
        return self.head(x)


class TableOfLabels(nn.Module):
    """A label net with a distribution for each label."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.logits = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, targets: Tensor) -> Tensor:
        return torch.softmax(self.logits[targets], 1)
