"""Logits shifted by log class counts: logit adjustment (balanced softmax), and ARB, which counts within each batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.methods.method import Method, Setting, always
from metakern.methods.weighted_step import weighted_step


def logit_adjusted_loss(logits: Tensor, targets: Tensor, counts: Tensor, *, tau: float = 1.0) -> Tensor:
    """l_n = cross entropy of z_n + tau log n_c; logits[n, C], targets[n], counts[C] -> [n].

    The logit of a class without examples becomes -inf, which excludes it. tau 1 is the balanced softmax.
    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10; Ren et al., "Balanced
    Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, equation 3.
    """
    shift = torch.where(counts > 0, tau * counts.clamp(min=1).to(logits).log(), -torch.inf)
    return F.cross_entropy(logits + shift, targets, reduction="none")


def arb_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """l_n = -log( e^z_y / sum_j (n_j / n_y) e^z_j ) with the class counts n of this batch; logits[n, C] -> [n].

    This is the logit-adjusted loss with the counts of the batch: classes that the batch does not contain are excluded.
    Source: ARB-Loss, Neurocomputing 2023. Its code clamps logits to +-30; a log-sum-exp needs no clamp.
    """
    return logit_adjusted_loss(logits, targets, torch.bincount(targets, minlength=logits.shape[1]))


def _logit_adjusted(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return logit_adjusted_loss(logits, targets, setting.class_counts)


def _arb(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return arb_loss(logits, targets)


LOGIT_ADJUSTMENT = Method(
    "logit-adjustment",
    "logits shifted by the log of the class counts",
    "Menon et al., ICLR 2021",
    always(weighted_step(criterion=_logit_adjusted)),
)
ARB = Method(
    "arb",
    "logits shifted by the log of the batch's class counts",
    "ARB-Loss, Neurocomputing 2023",
    always(weighted_step(criterion=_arb)),
)
