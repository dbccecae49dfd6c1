"""What a virtual step holds: gradient, theta^, its meta gradient and the direction are each as large as the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from benchmarks.measure import LiveStorage
from metakern.testing import inputs

CLASSES = 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, CLASSES))


class WeightNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), nn.Sigmoid())


class LabelNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, CLASSES)

    def forward(self, targets: Tensor) -> Tensor:
        return self.table(targets).softmax(1)


def reweighted(model: nn.Module, *given: Any) -> None:
    net = WeightNet()
    metakern.mwnet_step(model, net, *given, weight_optimizer=None, virtual_lr=0.1, memory="two_pass")


def corrected(model: nn.Module, *given: Any) -> None:
    metakern.mlc_step(model, LabelNet(), *given, label_optimizer=None, virtual_lr=0.1)


@pytest.mark.parametrize("step", [reweighted, corrected])
def test_two_at_a_time(step: Callable[..., None]) -> None:
    """Beside the products of a few small examples, which are a tenth of the model."""
    model, given = network(), inputs.pair(2, 2, 256, classes=CLASSES, dtype=torch.float32)
    step(model, *given)  # what is learnt once per model
    model.zero_grad(set_to_none=True)
    with LiveStorage() as live:
        step(model, *given)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert live.peak <= 2.6 * size
