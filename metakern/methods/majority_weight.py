"""Weighted: the class that background noise has enlarged is weighted down to the share of any other class."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.methods.method import Method, Setting, always
from metakern.methods.weighted_step import weighted_step


def swollen_class_weights(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """w_n = (1 / C) / (share of the largest class) for examples of that class, 1 for others; normalised to sum 1.

    Source: the "weighted" baseline of Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018,
    section 4.2. It knows the noise; here the shares are those of the training labels.
    """
    shares = setting.class_shares
    return _normalised(losses, targets == int(shares.argmax()), 1 / (len(shares) * float(shares.max())))


def as_shipped_weights(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """The same with the largest class of the batch and the factor 0.1 / (0.4 + 0.6 / C), whatever the data.

    The factor is right for ten classes and 40 % noise; for 100 classes, 0.1 should be 0.01.
    Source: the code published with Ren et al., ICML 2018.
    """
    classes = len(setting.class_counts)
    largest = int(torch.bincount(targets, minlength=classes).argmax())
    return _normalised(losses, targets == largest, 0.1 / (0.4 + 0.6 / classes))


def _normalised(losses: Tensor, lowered: Tensor, factor: float) -> Tensor:
    weights = torch.where(lowered, factor, 1.0).to(losses)
    return weights / weights.sum()


_SOURCE = "the baseline of Ren et al., ICML 2018"

WEIGHTED = Method(
    "weighted",
    "the largest class counts less, as if it had an equal share",
    _SOURCE,
    always(weighted_step(swollen_class_weights)),
    handles="noise",
)
WEIGHTED_AS_SHIPPED = Method(
    "weighted-as-shipped",
    "as in the paper's code: the factor is that of ten classes at 40 % noise",
    _SOURCE,
    always(weighted_step(as_shipped_weights)),
    handles="noise",
)
