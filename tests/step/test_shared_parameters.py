"""A weight net or label net that trains parameters of the model: the gradient of each would ignore the other."""

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.judge import Snapshot


class Weights(nn.Module):
    """Its first layer is given."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, nn.Linear(6, 1).double()

    def forward(self, losses: Tensor) -> Tensor:
        return torch.sigmoid(self.second(torch.tanh(self.first(losses.expand(-1, 4)))))


class Labels(Weights):
    def forward(self, targets: Tensor) -> Tensor:
        hidden = self.first(nn.functional.one_hot(targets, 4).double())
        return torch.softmax(hidden[:, :3], 1)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def test_is_refused() -> None:
    network, given = model(), inputs.pair(5, 3, 4, classes=3)
    weight_net, label_net = Weights(network[0]), Labels(network[0])
    before = Snapshot.of(network)
    with pytest.raises(ValueError, match=r"weight_net shares parameter '0\.weight' with the model"):
        metakern.mwnet_step(network, weight_net, *given, weight_optimizer=None, virtual_lr=0.1)
    with pytest.raises(ValueError, match="weight_net shares parameter"):
        metakern.compile_mwnet_step(network, weight_net, *given, weight_optimizer=None, virtual_lr=0.1)
    with pytest.raises(ValueError, match="label_net shares parameter"):
        metakern.mlc_step(network, label_net, *given, label_optimizer=None, virtual_lr=0.1)
    with pytest.raises(ValueError, match="label_net shares parameter"):
        metakern.compile_mlc_step(network, label_net, *given, label_optimizer=None, virtual_lr=0.1)
    before.assert_unchanged(network)


def test_frozen_ones_may_be_shared() -> None:
    network, given = model(), inputs.pair(5, 3, 4, classes=3)
    network[0].requires_grad_(False)
    metakern.mwnet_step(network, Weights(network[0]), *given, weight_optimizer=None, virtual_lr=0.1)
