"""GLC, forward correction, confusion-matrix correction, top-down labels: a channel estimated before the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.data import Examples, Task
from metakern.methods.method import Batch, Method, Outcome, Setting, Setup
from metakern.methods.noise_channel import (
    anchor_channel,
    confusion_channel,
    forward_corrected_loss,
    glc_channel,
    glc_loss,
    reverse_channel,
    top_down_loss,
)
from metakern.methods.plain_training import predict, train_plainly
from metakern.methods.weighted_step import step_on

Estimate = Callable[[nn.Module, Setup, Examples], Tensor]  # plain network, setup, noisy examples -> channel[C, C]
Corrected = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # logits, targets, is_clean[n], channel -> losses[n]


def with_meta(task: Task, seed: int) -> Task:
    """The task with its meta examples appended to the training set; they keep their true labels."""
    parts = task.train, task.meta
    joined = Examples(*(torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets", "ids")))
    return replace(task, train=joined, clean_targets=torch.cat([task.clean_targets, task.meta.targets]))


@dataclass
class CorrectedStep:
    """A step on the mean of `loss`, with the channel that `estimate` finds with a network trained on noisy labels.

    That network trains for as many steps as the run; the run's model then starts from its initial parameters. With
    `gold`, the last examples of the training set are the meta set, which the plain network does not see.
    """

    setup: Setup
    estimate: Estimate
    loss: Corrected
    gold: bool = False
    channel: Tensor = field(default_factory=lambda: torch.empty(0))

    def _noisy(self) -> int:
        task = self.setup.task
        return len(task.train) - len(task.meta) * self.gold

    def prepare(self) -> None:
        rows = torch.arange(self._noisy(), device=self.setup.task.train.targets.device)
        noisy = self.setup.task.train.take(rows)
        self.channel = self.estimate(train_plainly(self.setup, noisy, steps=self.setup.steps), self.setup, noisy)

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        inputs, targets = batch
        is_clean = (setting.indices >= self._noisy()).to(targets.device)
        return step_on(self.loss(model(inputs), targets, is_clean, self.channel), optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {"channel": self.channel}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.channel = state["channel"]


def _glc(network: nn.Module, setup: Setup, noisy: Examples) -> Tensor:
    return glc_channel(predict(network, setup.task.meta.inputs).softmax(1), setup.task.meta.targets)


def _confusion(network: nn.Module, setup: Setup, noisy: Examples) -> Tensor:
    predicted = predict(network, setup.task.meta.inputs).argmax(1)
    return confusion_channel(predicted, setup.task.meta.targets, setup.classes)


def _anchor(network: nn.Module, setup: Setup, noisy: Examples) -> Tensor:
    return anchor_channel(predict(network, noisy.inputs).softmax(1))


def _reverse(network: nn.Module, setup: Setup, noisy: Examples) -> Tensor:
    labels = noisy.counts(setup.classes)
    return reverse_channel(_glc(network, setup, noisy), labels / labels.sum())


def _forward(logits: Tensor, targets: Tensor, is_clean: Tensor, channel: Tensor) -> Tensor:
    return forward_corrected_loss(logits, targets, channel)


def _top_down(logits: Tensor, targets: Tensor, is_clean: Tensor, channel: Tensor) -> Tensor:
    known = F.cross_entropy(logits, targets, reduction="none")
    return torch.where(is_clean, known, top_down_loss(logits, targets, channel))


_HENDRYCKS = "Hendrycks et al., NeurIPS 2018"

GLC = Method(
    "glc",
    "labels corrected for a channel that a plain network's predictions on clean examples give",
    _HENDRYCKS,
    lambda setup: CorrectedStep(setup, _glc, glc_loss, gold=True),
    needs_meta=True,
    handles="noise",
    training_set=with_meta,
)
CONFUSION = Method(
    "confusion-correction",
    "the same with counts of predicted classes instead of probabilities",
    "the baseline of " + _HENDRYCKS,
    lambda setup: CorrectedStep(setup, _confusion, glc_loss, gold=True),
    needs_meta=True,
    handles="noise",
    training_set=with_meta,
)
FORWARD = Method(
    "forward-correction",
    "labels corrected for a channel guessed from the surest noisy examples, without clean ones",
    "Patrini et al., CVPR 2017",
    lambda setup: CorrectedStep(setup, _anchor, _forward),
    handles="noise",
)
TOP_DOWN = Method(
    "top-down",
    "labels turned into class probabilities by the channel's reverse, estimated as in glc",
    "Sukhbaatar et al., ICLR workshop 2015",
    lambda setup: CorrectedStep(setup, _reverse, _top_down, gold=True),
    needs_meta=True,
    handles="noise",
    training_set=with_meta,
)
