"""Meta-Weight-Net (MW-Net): a small network maps each example's loss to its weight, and learns from the meta set.

As a composition: virtual step -> grad dots at the virtual parameters -> step of the weight net -> weighted gradient ->
step. This is `metakern.mwnet_step`; this file has the paper's weight net and the settings of its two codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from metakern.methods.method import Method, Setup, Step
from metakern.methods.settings import require_counts
from metakern.methods.weight_net_step import WeightNetStep, device_of, seeded


class WeightNet(nn.Module):
    """losses[n, 1] -> weights[n, 1] in 0..1: one hidden layer of 100 units.

    Source: Shu et al., "Meta-Weight-Net", NeurIPS 2019, section 3.1.
    """

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        return self.layers(losses)


@dataclass(frozen=True)
class WeightNetSettings:
    """Settings; the defaults are those of MW-Net's code for noisy labels.

    normalise, detach_losses: as for `metakern.mwnet_step`. hidden: width of the weight net. optimizer: of the weight
    net, "adam", or "nesterov" with momentum 0.9. lr, weight_decay: of that optimizer. every: the weight net steps once
    in so many steps of the model. own_virtual_step: the virtual step is that of the run's optimizer instead of plain
    SGD.
    """

    normalise: str = "mean"
    detach_losses: bool = True
    hidden: int = 100
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    every: int = 1
    own_virtual_step: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "nesterov"):
            raise ValueError(f"the optimizer of the weight net must be adam or nesterov, got {self.optimizer!r}")
        require_counts(hidden=self.hidden, every=self.every)

    def optimizer_of(self, weight_net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the weight net."""
        parameters, lr, weight_decay = weight_net.parameters(), self.lr, self.weight_decay
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr, weight_decay=weight_decay)
        return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)


NOISE_CODE = WeightNetSettings()
IMBALANCE_CODE = WeightNetSettings(
    normalise="sum", detach_losses=False, optimizer="nesterov", lr=1e-5, weight_decay=5e-4
)


def mw_net(name: str, summary: str, handles: str, settings: WeightNetSettings) -> Method:
    """MW-Net with the given settings, under a name."""

    def begin(setup: Setup) -> Step:
        weight_net = seeded(lambda: WeightNet(settings.hidden), setup.seed, device_of(setup.model))
        return WeightNetStep(
            weight_net,
            settings.optimizer_of(weight_net),
            normalise=settings.normalise,
            detach_losses=settings.detach_losses,
            virtual="own" if settings.own_virtual_step else "sgd",
            every=settings.every,
        )

    return Method(
        name,
        summary,
        "Shu et al., NeurIPS 2019",
        begin,
        needs_meta=True,
        handles=handles,
        settings=settings,
        rebuilt=partial(mw_net, name, summary, handles),
    )


MW_NET = mw_net(
    "mw-net",
    "a small network from loss to weight, learned on a clean set; the settings of its code for noisy labels",
    "noise",
    NOISE_CODE,
)
MW_NET_IMBALANCE = mw_net(
    "mw-net-imbalance",
    "the same with the settings of its code for class imbalance",
    "imbalance",
    IMBALANCE_CODE,
)
