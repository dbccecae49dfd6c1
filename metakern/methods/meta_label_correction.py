"""Meta label correction (MLC): a small network proposes a soft label for every example, learned from gold data.

As a composition: proposed labels -> virtual step -> logit tangents along the meta gradient there -> step of the label
net -> step. This is `metakern.mlc_step`; this file has the settings of the published command.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import metakern
from metakern.methods.features import features, kept_features, last_linear
from metakern.methods.method import Batch, Method, Outcome, Setting, Setup, Step
from metakern.methods.settings import require_counts, require_shares
from metakern.methods.weight_net_step import device_of, seeded, virtual_rule
from metakern.step.label_net import LabelNet


@dataclass(frozen=True)
class CorrectionSettings:
    """Settings; the defaults are those of the command in the published code's README (the code's own lr is 3e-5).

    gold_share: share of each gold batch that trains the model along with the corrected examples; the rest is the meta
    batch. fused: the virtual step is also the step of the model; otherwise the label net steps first, and the model
    steps with its new labels. skip: the label net may keep the given label, to a degree that it learns. every: the
    label net steps once in so many steps of the model. lr: of the label net's Adam.
    """

    gold_share: float = 0.5
    fused: bool = True
    skip: bool = False
    every: int = 1
    lr: float = 3e-4

    def __post_init__(self) -> None:
        require_counts(every=self.every)
        require_shares(gold_share=self.gold_share)


def label_net(classes: int, features: int, *, skip: bool = False) -> LabelNet:
    """A `LabelNet` initialised as in the published code: weights by Xavier's rule, biases 0."""
    net = LabelNet(classes, features, skip=skip)
    nn.init.xavier_uniform_(net.embedding.weight)
    for layer in net.layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


class CorrectionStep:
    """A step on corrected labels. The reported weight p_n[y_n] / n is what remains of the given label."""

    def __init__(self, setup: Setup, settings: CorrectionSettings) -> None:
        self._setup, self._settings = setup, settings
        width = last_linear(setup.model).in_features
        self.label_net = seeded(
            lambda: label_net(setup.classes, width, skip=settings.skip), setup.seed, device_of(setup.model)
        )
        self._optimizer = torch.optim.Adam(self.label_net.parameters(), settings.lr, amsgrad=True)
        self._carry: dict[nn.Parameter, Tensor] | None = None

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        """Source: Zheng, Awadallah, Dumais, "Meta Label Correction for Noisy Label Learning", AAAI 2021, section 3.

        Raises: ValueError when there are too few gold examples to divide.
        """
        meta_batch, clean_batch = divided(meta_batch, self._settings.gold_share)
        with kept_features(model) as kept:
            result = metakern.mlc_step(
                model,
                self.label_net,
                batch,
                meta_batch,
                label_optimizer=self._optimizer,
                virtual_lr=None,
                features=kept,
                clean_batch=clean_batch,
                virtual=virtual_rule(optimizer),
                fused=self._settings.fused,
                step_label_net=(setting.step + 1) % self._settings.every == 0,
                carry=self._carry,
                optimizer=optimizer,
            )
        self._carry = None if result.carry is None else dict(result.carry)
        own = result.labels.gather(1, batch[1].unsqueeze(1)).squeeze(1)
        return Outcome(own.to(result.losses) / len(own), result.losses, result.meta_loss)

    @torch.no_grad()
    def corrected_labels(self, model: nn.Module) -> Tensor:
        """The labels that the label net proposes for all training examples, [N, C]."""
        train = self._setup.task.train
        known = features(model, train.inputs).to(next(self.label_net.parameters()))
        return self.label_net(train.targets, known)

    def state_dict(self) -> dict[str, Any]:
        carry = self._carry or {}
        return {
            "label_net": self.label_net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "carry": {name: carry[p] for name, p in self.label_net.named_parameters() if p in carry},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.label_net.load_state_dict(state["label_net"])
        self._optimizer.load_state_dict(state["optimizer"])
        parameters = dict(self.label_net.named_parameters())
        carry = {parameters[name]: value.to(parameters[name]) for name, value in state["carry"].items()}
        self._carry = carry or None


def divided(gold: Batch, share: float) -> tuple[Batch, Batch | None]:
    """The first part of a gold batch, for the meta loss, and the last `share` of it, to train on; None if share is 0.

    Raises: ValueError if one of the two would be empty.
    """
    if share == 0:
        return gold, None
    inputs, targets = gold
    cut = int((1 - share) * len(targets))
    if not 0 < cut < len(targets):
        raise ValueError(
            f"mlc trains on {100 * share:g} % of each batch of clean examples, and {len(targets)} cannot be divided "
            "so; give more by --meta-batch-size or --meta-per-class"
        )
    return (inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:])


def _method(name: str, summary: str, settings: CorrectionSettings) -> Method:
    def begin(setup: Setup) -> Step:
        return CorrectionStep(setup, settings)

    return Method(
        name,
        summary,
        "Zheng et al., AAAI 2021",
        begin,
        needs_meta=True,
        handles="noise",
        meta_batch_size=32,
        settings=settings,
        rebuilt=partial(_method, name, summary),
    )


_CODE = CorrectionSettings()

MLC = _method(
    "mlc", "labels corrected by a small network that learns from a clean set; the settings of its README", _CODE
)
MLC_GOLD_APART = _method(
    "mlc-gold-apart", "mlc with all clean examples for the meta loss, none to train on", replace(_CODE, gold_share=0.0)
)
MLC_NEW_LABELS = _method(
    "mlc-new-labels",
    "mlc-gold-apart whose model steps after the label net, on its new labels",
    replace(_CODE, gold_share=0.0, fused=False),
)
MLC_SKIP = _method(
    "mlc-skip",
    "mlc whose label net may keep the given label, and steps every fifth step",
    replace(_CODE, skip=True, every=5),
)
MLC_METHODS = (MLC, MLC_GOLD_APART, MLC_NEW_LABELS, MLC_SKIP)
