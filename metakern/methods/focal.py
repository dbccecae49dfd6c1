"""Focal loss: easy examples count less, by the probability the model gives their class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.methods.method import Method, Setting, always
from metakern.methods.weighted_step import weighted_step


def focal_loss(logits: Tensor, targets: Tensor, *, gamma: float = 2.0, detach: bool = False) -> Tensor:
    """l_n = -(1 - p_n)^gamma log p_n, p_n = softmax(z_n)[y_n]; logits[n, C], targets[n] int64 -> [n].

    With `detach` the factor is a constant weight, which several published codes do; the paper differentiates it.
    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4.
    """
    losses = F.cross_entropy(logits, targets, reduction="none")
    # 1 - p = 1 - exp(-loss), by expm1: no cancellation where the example is already easy.
    factor = (-torch.expm1(-losses)).clamp(min=0) ** gamma
    return (factor.detach() if detach else factor) * losses


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, *, gamma: float = 2.0) -> Tensor:
    """The same with one sigmoid per class, summed over classes: l_n = -sum_c (1 - p_nc)^gamma log p_nc.

    p_nc = sigmoid(z_nc) for n's own class and 1 - sigmoid(z_nc) for the others.
    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 3.
    """
    sign = 2 * F.one_hot(targets, logits.shape[1]).to(logits) - 1
    log_p = F.logsigmoid(sign * logits)
    return -((-torch.expm1(log_p)).clamp(min=0) ** gamma * log_p).sum(1)


def _criterion(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return focal_loss(logits, targets)


def _detached(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return focal_loss(logits, targets, detach=True)


def _sigmoid(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return sigmoid_focal_loss(logits, targets)


FOCAL = Method(
    "focal", "easy examples count less, gamma 2", "Lin et al., ICCV 2017", always(weighted_step(criterion=_criterion))
)
FOCAL_DETACHED = Method(
    "focal-detached",
    "focal with its factor taken as a constant, as several codes have it",
    "Lin et al., ICCV 2017",
    always(weighted_step(criterion=_detached)),
)
FOCAL_SIGMOID = Method(
    "focal-sigmoid",
    "focal with a sigmoid for each class, summed over classes",
    "Lin et al., ICCV 2017",
    always(weighted_step(criterion=_sigmoid)),
)
