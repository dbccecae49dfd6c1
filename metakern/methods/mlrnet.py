"""MLRNet: a weight net that sees an example's loss curve, the classifier's features of it, and its label.

As a composition: a plain run records loss curves; then every step is a `metakern.mwnet_step` whose weight net sees the
class-centred curve, the penultimate features of the step's own forward pass, and the label.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metakern.methods.features import features, kept_features, last_linear
from metakern.methods.loss_curves import Phase, class_centred, example_losses, probe
from metakern.methods.method import Batch, Method, Outcome, Setting, Setup, WeightingFunction
from metakern.methods.settings import require_counts
from metakern.methods.weight_net_step import WeightNetStep, device_of, seeded, weights_over_curves

EXAMPLES_DRAWN = 100  # of a class, whose mean features its weighting function is drawn with


@dataclass(frozen=True)
class MLRNetSettings:
    """Settings; the paper gives the defaults, except lr, weight_decay and eps of the weight net's Adam.

    probing_epochs: epochs of stage 1, at most those of the run. width: D. embedding: width of the label's embedding.
    own_virtual_step: the virtual step is that of the run's optimizer instead of plain SGD as in the paper's equations.
    every: the weight net steps once in so many steps of the model.
    """

    probing_epochs: int = 10
    width: int = 128
    embedding: int = 128
    lr: float = 1e-3
    weight_decay: float = 1e-4
    # The classifier's learning rate, 1e-5 in the paper, scales the meta-gradient: Adam's usual 1e-8 would drown it.
    eps: float = 1e-12
    own_virtual_step: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        require_counts(probing_epochs=self.probing_epochs, width=self.width, embedding=self.embedding, every=self.every)


def _tanh_layers(inputs: int, width: int, layers: int) -> nn.Sequential:
    made: list[nn.Module] = []
    for k in range(layers):
        made += [nn.Linear(width if k else inputs, width), nn.Tanh()]
    return nn.Sequential(*made)


class MLRNet(nn.Module):
    """losses[n, 1] (not used), curves[n, T], features[n, d], labels[n] -> weights[n, 1] in 0..1.

    DF_n = content(h_n, E[y_n]) + curve(I_n),  w_n = sigmoid(a . weigh(DF_n) + b)
    curve, content and weigh have three, two and three tanh layers; E[C, 128] is an embedding of the label; DF has
    `width` entries.
    Source: Yu, Li, "MLRNet", Applied Sciences 14(1):164, 2024, equation 7 and section 4.3.
    """

    def __init__(self, curve_length: int, features: int, classes: int, *, width: int = 128, embedding: int = 128):
        super().__init__()
        self.labels = nn.Embedding(classes, embedding)
        self.curve = _tanh_layers(curve_length, width, 3)
        self.content = _tanh_layers(features + embedding, width, 2)
        self.weigh = nn.Sequential(*_tanh_layers(width, width, 3), nn.Linear(width, 1), nn.Sigmoid())

    def forward(self, losses: Tensor, curves: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        content = self.content(torch.cat([features, self.labels(labels)], 1))
        return self.weigh(content + self.curve(curves))


class MLRNetStep:
    """The second stage. `prepare` is the first: it sets `curves`[N, T], class-centred, one row per training example.

    The virtual step is plain SGD at the run's learning rate, as in the paper's equations, or that of the run's
    optimizer.
    """

    def __init__(self, setup: Setup, settings: MLRNetSettings) -> None:
        epochs = max(1, min(settings.probing_epochs, setup.steps // setup.steps_per_epoch))
        self._setup, self._epochs = setup, epochs
        sizes = epochs + 1, last_linear(setup.model).in_features, setup.classes
        weight_net = seeded(
            lambda: MLRNet(*sizes, width=settings.width, embedding=settings.embedding),
            setup.seed,
            device_of(setup.model),
        )
        optimizer = torch.optim.Adam(
            weight_net.parameters(), settings.lr, eps=settings.eps, weight_decay=settings.weight_decay
        )
        virtual = "own" if settings.own_virtual_step else "sgd"
        self._step = WeightNetStep(weight_net, optimizer, normalise="mean", virtual=virtual, every=settings.every)
        self.curves = torch.zeros(len(setup.task.train), epochs + 1, device=device_of(setup.model))

    def prepare(self) -> None:
        """Stage 1: losses before training and after each epoch of a plain run, minus the mean of the class."""
        train = self._setup.task.train
        first = example_losses(self._setup.model, train).unsqueeze(1)
        later = probe(self._setup, [Phase(self._epochs, self._setup.batch_size)])
        self.curves = class_centred(torch.cat([first, later], 1), train.targets, self._setup.classes)

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        curves, labels = self.curves[setting.indices], batch[1]
        with kept_features(model) as kept:
            return self._step(
                model,
                batch,
                meta_batch,
                optimizer=optimizer,
                setting=setting,
                features=lambda model, batch: (curves, kept(model, batch), labels),
            )

    def weighting_function(self) -> WeightingFunction:
        """One curve each for at most eight classes, at the mean features of some of their training examples."""
        train, found = self._setup.task.train, {}
        for c, name in enumerate(self._setup.task.class_names[:8]):
            some = (train.targets == c).nonzero().squeeze(1)[:EXAMPLES_DRAWN]
            if len(some):
                known = features(self._setup.model, train.inputs[some]).mean(0, keepdim=True)
                found[name] = (known.to(next(self._step.weight_net.parameters())), train.targets[some[:1]])
        return weights_over_curves(self._step.weight_net, self.curves.shape[1], found)

    def state_dict(self) -> dict[str, Any]:
        return {**self._step.state_dict(), "curves": self.curves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step.load_state_dict(state)
        self.curves = state["curves"].to(self.curves)


def mlrnet(name: str, summary: str, settings: MLRNetSettings) -> Method:
    """MLRNet with the given settings, under a name."""
    return Method(
        name,
        summary,
        "Yu and Li, Applied Sciences 2024",
        lambda setup: MLRNetStep(setup, settings),
        batch_size=30,
        meta_batch_size=30,
        needs_meta=True,
        handles="both",
        settings=settings,
        rebuilt=partial(mlrnet, name, summary),
    )


MLRNET = mlrnet("mlrnet", "a weight net on loss curves, the classifier's features and the label", MLRNetSettings())
MLRNET_OWN_STEP = mlrnet(
    "mlrnet-own-step",
    "the same with the virtual step of the run's own optimizer, such as the paper's Adam, instead of plain SGD",
    MLRNetSettings(own_virtual_step=True),
)
