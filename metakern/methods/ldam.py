"""LDAM: larger margins for rarer classes; class-balanced weights (DRW) or batches (DRS) late in training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from metakern.data.sampling import class_balanced
from metakern.methods.class_weights import class_balanced_rule
from metakern.methods.method import DEFERRED, Method, Setting, always
from metakern.methods.weighted_step import uniform_weights, weighted_step


def ldam_margins(counts: Tensor, *, largest: float = 0.5) -> Tensor:
    """margin_c proportional to n_c^(-1/4), the largest of them `largest`; counts[C] -> [C] float32.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, eq. 13.
    """
    margins = counts.clamp(min=1).double() ** -0.25
    return (largest * margins / margins.max()).float()


def ldam_loss(logits: Tensor, targets: Tensor, margins: Tensor, *, scale: float = 1.0) -> Tensor:
    """l_n = cross entropy of scale * (z_n - margin[y_n] at y_n); logits[n, C], targets[n] -> [n].

    The paper uses scale 30 with a last layer whose rows and inputs are normalised, so that z is a cosine. Ordinary
    logits have a scale of their own; scale 1 keeps it.
    Source: as `ldam_margins`, equation 12.
    """
    shift = F.one_hot(targets, logits.shape[1]) * margins.to(logits)[targets].unsqueeze(1)
    return F.cross_entropy(scale * (logits - shift), targets, reduction="none")


def _criterion(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return ldam_loss(logits, targets, ldam_margins(setting.class_counts))


_balanced = class_balanced_rule()


def deferred(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """Equal weights for four fifths of the run, then class-balanced ones (in the paper: from epoch 160 of 200).

    Source: as `ldam_margins`, algorithm 1.
    """
    rule = uniform_weights if setting.progress < DEFERRED else _balanced
    return rule(losses, targets, setting)


_SOURCE = "Cao et al., NeurIPS 2019"

LDAM = Method("ldam", "larger margins for rarer classes", _SOURCE, always(weighted_step(criterion=_criterion)))
LDAM_DRW = Method(
    "ldam-drw",
    "larger margins for rarer classes, class-balanced weights for the last fifth",
    _SOURCE,
    always(weighted_step(deferred, _criterion)),
)
CE_DRW = Method(
    "ce-drw",
    "plain steps, then class-balanced weights for the last fifth",
    _SOURCE,
    always(weighted_step(deferred)),
)
CE_DRS = Method(
    "ce-drs",
    "plain steps, then class-balanced batches for the last fifth",
    _SOURCE,
    always(weighted_step()),
    late_sampler=class_balanced,
)
