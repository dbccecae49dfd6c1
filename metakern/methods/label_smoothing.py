"""Label smoothing, with the same strength for all classes or one per class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.methods.method import Method, Setting, always
from metakern.methods.weighted_step import weighted_step


def label_smoothing_loss(logits: Tensor, targets: Tensor, smoothing: float | Tensor = 0.1) -> Tensor:
    """l_n = -(1 - e) log q_n[y_n] - (e / C) sum_k log q_n[k]; e one number, or smoothing[C] and e = smoothing[y_n].

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.
    """
    log_q = F.log_softmax(logits, 1)
    strength = torch.as_tensor(smoothing).to(logits).expand(logits.shape[1])[targets]
    own = log_q.gather(1, targets.unsqueeze(1)).squeeze(1)
    return -(1 - strength) * own - strength * log_q.mean(1)


def smoothing_by_count(counts: Tensor, *, largest: float = 0.1) -> Tensor:
    """Rarer classes are smoothed more: e_c = largest * min n / n_c; counts[C] -> [C] float32.

    Source: class-conditional label smoothing of Shwartz-Ziv et al., "Simplifying Neural Network Training Under Class
    Imbalance", NeurIPS 2023, where minority classes are smoothed more. This formula is our own.
    """
    counts = counts.clamp(min=1).double()
    return (largest * counts.min() / counts).float()


def _plain(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return label_smoothing_loss(logits, targets)


def smoothed_by_class(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """`label_smoothing_loss` with the strengths of `smoothing_by_count`, [n]."""
    return label_smoothing_loss(logits, targets, smoothing_by_count(setting.class_counts))


LABEL_SMOOTHING = Method(
    "label-smoothing",
    "targets mixed with the uniform distribution, 0.1",
    "Szegedy et al., CVPR 2016",
    always(weighted_step(criterion=_plain)),
    handles="both",
)
LABEL_SMOOTHING_BY_CLASS = Method(
    "label-smoothing-by-class",
    "rarer classes smoothed more",
    "Shwartz-Ziv et al., NeurIPS 2023",
    always(weighted_step(criterion=smoothed_by_class)),
)
