"""The S-Model, its complex variant, and the bottom-up noise layer: channels learned with the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metakern.methods.features import last_linear
from metakern.methods.method import Batch, Method, Outcome, Setting, Setup, Step
from metakern.methods.noise_channel import channel_logits, channel_logits_from_confusion, s_model_loss
from metakern.methods.noise_layer import (
    ComplexNoise,
    SoftmaxChannel,
    StochasticMatrix,
    complex_noise_loss,
    stochastic_loss,
)
from metakern.methods.phases import with_phases
from metakern.methods.plain_training import predict, train_plainly
from metakern.methods.weight_net_step import device_of

# The channel's start where nothing is known: the share of wrong labels it assumes.
ASSUMED_NOISE = 0.4

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # channel, logits[n, C], targets[n], features -> [n]


@dataclass
class ChannelStep:
    """A step of network and channel on the mean of `loss`; each has an optimizer of its own with the run's settings.

    With `from_confusion`, the channel is initialised from the confusion of given labels and predictions of a network
    trained plainly for as many steps. The channel is not changed in the first `burn_in` of the run.
    """

    setup: Setup
    channel: nn.Module
    loss: Loss
    from_confusion: bool = False
    burn_in: float = 0.0

    def __post_init__(self) -> None:
        self.channel.to(device_of(self.setup.model))
        self.channel_optimizer = self.setup.make_optimizer(self.channel)

    def prepare(self) -> None:
        if not self.from_confusion:
            return
        train = self.setup.task.train
        network = train_plainly(self.setup, train, steps=self.setup.steps)
        predicted = predict(network, train.inputs).argmax(1)
        logits = channel_logits_from_confusion(predicted, train.targets, self.setup.classes)
        with torch.no_grad():
            start = self.channel.layer.bias if isinstance(self.channel, ComplexNoise) else self.channel.logits
            assert isinstance(start, Tensor)
            start.copy_(logits.view_as(start))

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        inputs, targets = batch
        logits, features = _with_features(model, inputs)
        losses = self.loss(self.channel, logits, targets, features)
        optimizer.zero_grad(set_to_none=True)
        self.channel_optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        optimizer.step()
        if setting.progress >= self.burn_in:
            for own, group in zip(self.channel_optimizer.param_groups, optimizer.param_groups):
                own["lr"] = group["lr"]  # which the run may lower as it goes
            self.channel_optimizer.step()
            if isinstance(self.channel, StochasticMatrix):
                self.channel.project()
        return Outcome(torch.full_like(losses, 1 / len(losses)), losses.detach(), None)

    def state_dict(self) -> dict[str, Any]:
        return {"channel": self.channel.state_dict(), "optimizer": self.channel_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.channel.load_state_dict(state["channel"])
        self.channel_optimizer.load_state_dict(state["optimizer"])


def _with_features(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits[n, C], and features[n, d] through which the gradient passes."""
    seen: list[Tensor] = []
    hook = last_linear(model).register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        return model(inputs), seen[-1].flatten(1)
    finally:
        hook.remove()


def _simple(channel: nn.Module, logits: Tensor, targets: Tensor, features: Tensor) -> Tensor:
    return s_model_loss(logits, targets, channel())


def _complex(channel: nn.Module, logits: Tensor, targets: Tensor, features: Tensor) -> Tensor:
    return complex_noise_loss(logits, targets, channel(features))


def _bottom_up(channel: nn.Module, logits: Tensor, targets: Tensor, features: Tensor) -> Tensor:
    return stochastic_loss(logits, targets, channel())


def _like(setup: Setup, tensor: Tensor) -> Tensor:
    return tensor.to(next(setup.model.parameters()))


def begin_s_model(setup: Setup) -> Step:
    """The simple channel, initialised with uniform noise."""
    return ChannelStep(setup, SoftmaxChannel(_like(setup, channel_logits(setup.classes, ASSUMED_NOISE))), _simple)


def begin_s_model_conf(setup: Setup) -> Step:
    """The simple channel, initialised from the confusion matrix of a plain network."""
    start = _like(setup, channel_logits(setup.classes, ASSUMED_NOISE))
    return ChannelStep(setup, SoftmaxChannel(start), _simple, from_confusion=True)


def begin_complex(setup: Setup) -> Step:
    """The channel that depends on penultimate features, initialised from the confusion matrix of a plain network."""
    start = _like(setup, channel_logits(setup.classes, ASSUMED_NOISE))
    layer = ComplexNoise(last_linear(setup.model).in_features, start).to(start)
    return ChannelStep(setup, layer, _complex, from_confusion=True)


def begin_bottom_up(setup: Setup) -> Step:
    """A stochastic matrix after the softmax: the identity for the first fifth of the run, then learned."""
    layer = StochasticMatrix(setup.classes).to(next(setup.model.parameters()).dtype)
    return ChannelStep(setup, layer, _bottom_up, burn_in=0.2)


_GOLDBERGER = "Goldberger, Ben-Reuven, ICLR 2017"

S_MODEL = Method("s-model", "a noise channel learned behind the softmax", _GOLDBERGER, begin_s_model, handles="noise")
S_MODEL_CONF = Method(
    "s-model-conf",
    "the same, from the confusion matrix of a plain network",
    _GOLDBERGER,
    begin_s_model_conf,
    handles="noise",
)
NOISE_ADAPTATION = Method(
    "noise-adaptation",
    "the channel depends on the penultimate features",
    _GOLDBERGER,
    begin_complex,
    handles="noise",
)
BOTTOM_UP = Method(
    "bottom-up",
    "a stochastic matrix behind the softmax, pulled away from the identity",
    "Sukhbaatar et al., ICLR workshop 2015",
    begin_bottom_up,
    handles="noise",
)
CHANNEL_METHODS = (
    S_MODEL,
    S_MODEL_CONF,
    with_phases(S_MODEL_CONF, "es"),
    with_phases(S_MODEL_CONF, "ft"),
    with_phases(S_MODEL_CONF, "es", "ft"),
    NOISE_ADAPTATION,
    BOTTOM_UP,
)
