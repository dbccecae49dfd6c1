"""Focal loss: the higher the probability of its class, the less an example counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.methods.class_weights import class_balanced_rule, require_beta
from metakern.methods.features import last_linear
from metakern.methods.method import Method, Setting, Setup, Step
from metakern.methods.weighted_step import uniform_weights, weighted_step


def focal_loss(logits: Tensor, targets: Tensor, *, gamma: float = 2.0, detach: bool = False) -> Tensor:
    """l_n = -(1 - p_n)^gamma log p_n, p_n = softmax(z_n)[y_n]; logits[n, C], targets[n] int64 -> [n].

    With `detach` the factor is a constant weight, as in several published codes; the paper differentiates it.
    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4.
    """
    losses = F.cross_entropy(logits, targets, reduction="none")
    # 1 - p = 1 - exp(-loss), by expm1: no cancellation where the example is already easy.
    factor = _positive(-torch.expm1(-losses)) ** gamma
    return (factor.detach() if detach else factor) * losses


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, *, gamma: float = 2.0) -> Tensor:
    """The same with one sigmoid per class, summed over classes: l_n = -sum_c (1 - p_nc)^gamma log p_nc.

    p_nc = sigmoid(z_nc) for n's own class and 1 - sigmoid(z_nc) for the others.
    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 3.
    """
    sign = 2 * F.one_hot(targets, logits.shape[1]).to(logits) - 1
    log_p = F.logsigmoid(sign * logits)
    return -(_positive(-torch.expm1(log_p)) ** gamma * log_p).sum(1)


def start_at_prior(model: nn.Module, classes: int) -> None:
    """The bias of the last linear layer, if it has one, becomes -log(C - 1): sigmoids of small outputs are near 1 / C.

    Without it, the C - 1 sigmoids of the other classes dominate the first gradients.
    Raises: ValueError if there is no linear layer.
    Source: the code of Cui et al., CVPR 2019; the prior of Lin et al., ICCV 2017, section 4.1.
    """
    bias = last_linear(model).bias
    if bias is not None:
        nn.init.constant_(bias, -math.log(classes - 1))


def _positive(value: Tensor) -> Tensor:
    """At least the smallest positive number: at 0, a power below 1 has an infinite slope."""
    return value.clamp(min=torch.finfo(value.dtype).tiny)


@dataclass(frozen=True)
class FocalSettings:
    """gamma: how strongly easy examples are down-weighted. beta: of class weights by the effective number; 0 for none.

    Source: Cui et al., CVPR 2019, for both together (class-balanced focal loss).
    """

    gamma: float = 2.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        require_beta(self.beta)
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be 0 or more, got {self.gamma}")


def _method(
    name: str, about: str, loss: Callable[..., Tensor], *, prior: bool = False
) -> Callable[[FocalSettings], Method]:
    """The method `name` with losses loss(logits, targets, gamma=...), as a function of its settings.

    With `prior`, a run begins with the bias of `start_at_prior`.
    """

    def with_settings(settings: FocalSettings) -> Method:
        def criterion(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
            return loss(logits, targets, gamma=settings.gamma)

        rule = class_balanced_rule(settings.beta) if settings.beta else uniform_weights
        step = weighted_step(rule, criterion)

        def begin(setup: Setup) -> Step:
            if prior:
                start_at_prior(setup.model, setup.classes)
            return step

        return Method(name, about, "Lin et al., ICCV 2017", begin, settings=settings, rebuilt=with_settings)

    return with_settings


FOCAL = _method("focal", "easy examples count less, gamma 2", focal_loss)(FocalSettings())
FOCAL_DETACHED = _method(
    "focal-detached",
    "focal with its factor taken as a constant, as several codes have it",
    partial(focal_loss, detach=True),
)(FocalSettings())
FOCAL_SIGMOID = _method(
    "focal-sigmoid", "focal with a sigmoid for each class, summed over classes", sigmoid_focal_loss, prior=True
)(FocalSettings())
