"""Meta-Weight-Net (MW-Net): a small network turns each example's loss into its weight, and learns from the meta set.

As a composition: virtual step -> grad dots at the virtual parameters -> step of the weight net -> weighted gradient ->
step. All of it is `metakern.mwnet_step`; what is here is the paper's weight net and the two settings of its codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metakern.methods.method import Method, Setup, Step
from metakern.methods.weight_net_step import WeightNetStep, device_of, seeded


class WeightNet(nn.Module):
    """losses[n, 1] -> weights[n, 1] in 0..1: one hidden layer of 100.

    Source: Shu et al., "Meta-Weight-Net", NeurIPS 2019, section 3.1.
    """

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        return self.layers(losses)


def begin_for_noise(setup: Setup) -> Step:
    """The code for noisy labels: weighted mean, losses enter the weight net as constants, Adam 1e-3, decay 1e-4."""
    weight_net = seeded(WeightNet, setup.seed, device_of(setup.model))
    optimizer = torch.optim.Adam(weight_net.parameters(), 1e-3, weight_decay=1e-4)
    return WeightNetStep(weight_net, optimizer, normalise="mean", detach_losses=True)


def begin_for_imbalance(setup: Setup) -> Step:
    """The code for imbalance: weights normalised to sum 1, everything differentiated, Nesterov SGD 1e-5, decay 5e-4."""
    weight_net = seeded(WeightNet, setup.seed, device_of(setup.model))
    optimizer = torch.optim.SGD(weight_net.parameters(), 1e-5, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return WeightNetStep(weight_net, optimizer, normalise="sum", detach_losses=False)


MW_NET = Method(
    "mw-net",
    "a small network from loss to weight, learned on a clean set; the settings of its code for noisy labels",
    "Shu et al., NeurIPS 2019",
    begin_for_noise,
    needs_meta=True,
    handles="noise",
)
MW_NET_IMBALANCE = Method(
    "mw-net-imbalance",
    "the same with the settings of its code for class imbalance",
    "Shu et al., NeurIPS 2019",
    begin_for_imbalance,
    needs_meta=True,
)
