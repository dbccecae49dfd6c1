"""CurveNet: a weight net that sees an example's whole loss curve and its label.

As a composition: a probing run records the loss curves; then `metakern.mwnet_step` with curve and label. For the rest
of the run, each example keeps the last weight that it had.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.methods.loss_curves import Phase, class_centred, probe
from metakern.methods.method import Batch, Method, Outcome, Setting, Setup, WeightingFunction
from metakern.methods.settings import require_counts, require_shares
from metakern.methods.weight_net_step import WeightNetStep, device_of, seeded, weights_over_curves
from metakern.methods.weighted_step import step_on


@dataclass(frozen=True)
class CurveSettings:
    """Settings; the defaults are those of CurveNet's code.

    probing: epochs of the probing run for each epoch of the run (300 for 200). first_epoch: first epoch of the probing
    run that belongs to a curve; at most a quarter of its epochs are left out. learning_share: share of the run in which
    the weight net learns (epochs 0 to 79 of 200). label_times: factor of the label's embedding (the code adds it
    twice). least_weight: added to the sigmoid. lr, weight_decay: of the weight net's Adam. every: the weight net steps
    once in so many steps of the model.
    """

    probing: float = 1.5
    first_epoch: int = 5
    learning_share: float = 0.4
    label_times: int = 2
    least_weight: float = 0.02
    lr: float = 1e-3
    weight_decay: float = 1e-4
    every: int = 1

    def __post_init__(self) -> None:
        require_counts(label_times=self.label_times, every=self.every)
        require_shares(learning_share=self.learning_share, least_weight=self.least_weight)
        if self.first_epoch < 0 or not self.probing > 0:
            raise ValueError(f"first_epoch must be 0 or more, probing above 0, got {self.first_epoch}, {self.probing}")


class CurveNet(nn.Module):
    """losses[n, 1] (not used), curves[n, T], labels[n] -> weights[n, 1], from `least_weight` to 1 + `least_weight`.

    Curve: layers T - 128 - 128 - 64 with ReLU; plus `label_times` times an embedding [C, 64] of the label; then 64 -
    128 - 64 - 1; w = sigmoid + least_weight. The last bias is initialised to 4.5, so that all weights start near 1.
    Matrices are initialised by Xavier's rule, so that the label's embedding is as small as the curve's part; other
    biases are 0.
    Source: Jiang et al., "Delving into Sample Loss Curve to Embrace Noisy and Imbalanced Data", AAAI 2022; its code.
    """

    def __init__(self, curve_length: int, classes: int, *, label_times: int = 2, least_weight: float = 0.02) -> None:
        super().__init__()
        self.labels, self.label_times, self.least_weight = nn.Embedding(classes, 64), label_times, least_weight
        self.curve = nn.Sequential(*_relu_layers(curve_length, 128, 128, 64))
        self.weigh = nn.Sequential(*_relu_layers(64, 128, 64), nn.Linear(64, 1))
        nn.init.xavier_uniform_(self.labels.weight)
        for layer in (*self.curve, *self.weigh):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.weigh[-1].bias, 4.5)  # type: ignore[arg-type]

    def forward(self, losses: Tensor, curves: Tensor, labels: Tensor) -> Tensor:
        seen = self.curve(curves) + self.label_times * self.labels(labels)
        return torch.sigmoid(self.weigh(seen)) + self.least_weight


def _relu_layers(*widths: int) -> list[nn.Module]:
    return [layer for inputs, outputs in pairwise(widths) for layer in (nn.Linear(inputs, outputs), nn.ReLU())]


def probing_epochs(settings: CurveSettings, run: float) -> tuple[int, int]:
    """For a run of `run` epochs: the epochs of the probing run, and the first one that belongs to a curve.

    A curve is the loss over several epochs: there are at least four, and at least three quarters of them belong to it.
    """
    epochs = max(4, round(settings.probing * run))
    return epochs, min(settings.first_epoch, epochs // 4)


def probing_phases(epochs: int, batch_size: int) -> list[Phase]:
    """Two fifths of the epochs as in the run; then an eighth of the batch, at 1/10 and 1/100 of the rate in turn.

    Each turn lasts a twentieth of the epochs, 15 of 300. The network repeatedly fits its labels and forgets them again,
    which separates clean, rare and wrongly labelled examples.
    """
    steady = round(0.4 * epochs)
    turn = max(1, epochs // 20)
    late = Phase(epochs - steady, max(1, batch_size // 8), lambda epoch: 0.1 ** (1 + epoch // turn % 2))
    return [Phase(steady, batch_size), late] if steady else [late]


class CurveNetStep:
    """Weights from the weight net in the first part of the run; afterwards the last weight of each example."""

    def __init__(self, setup: Setup, settings: CurveSettings) -> None:
        epochs, first = probing_epochs(settings, setup.steps / setup.steps_per_epoch)
        self._setup, self._settings, self._first = setup, settings, first
        self._phases = probing_phases(epochs, setup.batch_size)
        device = device_of(setup.model)
        options = {"label_times": settings.label_times, "least_weight": settings.least_weight}
        weight_net = seeded(lambda: CurveNet(epochs - first, setup.classes, **options), setup.seed, device)
        optimizer = torch.optim.Adam(weight_net.parameters(), settings.lr, weight_decay=settings.weight_decay)
        self._step = WeightNetStep(weight_net, optimizer, normalise="mean", virtual="own", every=settings.every)
        self.curves = torch.zeros(len(setup.task.train), epochs - first, device=device)
        self.memory = torch.full((len(setup.task.train),), torch.nan, device=device)

    def prepare(self) -> None:
        """The probing run: class-centred loss curves from the first epoch that counts."""
        curves = probe(self._setup, self._phases)[:, self._first :]
        self.curves = class_centred(curves, self._setup.task.train.targets, self._setup.classes)

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        features = self.curves[setting.indices], batch[1]
        if setting.progress >= self._settings.learning_share:
            return self._remembered(model, batch, features, optimizer, setting)
        outcome = self._step(model, batch, meta_batch, optimizer=optimizer, setting=setting, features=features)
        self.memory[setting.indices] = outcome.weights.to(self.memory) * len(outcome.weights)
        return outcome

    @torch.no_grad()
    def _weights(self, features: tuple[Tensor, Tensor], setting: Setting) -> Tensor:
        """The remembered weights of a batch; for examples without one, what the weight net gives now."""
        curves, labels = features
        net = self._step.weight_net
        fresh = net(curves[:, :1], curves.to(next(net.parameters())), labels).squeeze(1)
        held = self.memory[setting.indices]
        return torch.where(held.isnan(), fresh.to(held), held) / len(held)

    def _remembered(
        self,
        model: nn.Module,
        batch: Batch,
        features: tuple[Tensor, Tensor],
        optimizer: torch.optim.Optimizer,
        setting: Setting,
    ) -> Outcome:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return step_on(losses, optimizer, self._weights(features, setting).to(losses))

    def weighting_function(self) -> WeightingFunction:
        """One curve each for at most eight classes."""
        names = self._setup.task.class_names[:8]
        features = {name: (torch.tensor([c], device=self.curves.device),) for c, name in enumerate(names)}
        return weights_over_curves(self._step.weight_net, self.curves.shape[1], features)

    def state_dict(self) -> dict[str, Any]:
        return {**self._step.state_dict(), "curves": self.curves, "memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step.load_state_dict(state)
        self.curves, self.memory = state["curves"].to(self.curves), state["memory"].to(self.memory)


def curve_net(settings: CurveSettings) -> Method:
    """CurveNet with the given settings."""
    return Method(
        "curve-net",
        "a weight net on the loss curve of a probing run and the label",
        "Jiang et al., AAAI 2022",
        lambda setup: CurveNetStep(setup, settings),
        batch_size=128,
        meta_batch_size=128,
        needs_meta=True,
        handles="both",
        settings=settings,
        rebuilt=curve_net,
    )


CURVE_NET = curve_net(CurveSettings())
