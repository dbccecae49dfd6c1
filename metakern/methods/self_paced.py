"""Self-paced learning: easy examples first, harder ones as training goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.methods.method import Method, Setting, always
from metakern.methods.weighted_step import weighted_step


def hard_weights(losses: Tensor, threshold: float | Tensor) -> Tensor:
    """v_n = [l_n < threshold].

    Source: Kumar, Packer, Koller, "Self-Paced Learning for Latent Variable Models", NIPS 2010, equation 4.
    """
    return (losses < threshold).to(losses)


def linear_weights(losses: Tensor, threshold: float | Tensor) -> Tensor:
    """v_n = max(0, 1 - l_n / threshold).

    Source: Jiang et al., "Easy Samples First: Self-paced Reranking", ACM Multimedia 2014.
    """
    return (1 - losses / threshold).clamp(min=0)


def threshold(losses: Tensor, progress: float, *, first: float = 0.5) -> Tensor:
    """The quantile of the losses of a batch at first + (1 - first) * progress: a threshold that grows during the run.

    The papers multiply the threshold by 1.1 to 1.3 per epoch; a quantile does not depend on the scale of the losses.
    """
    share = first + (1 - first) * progress
    found = torch.quantile(losses.float(), min(share, 1.0)).to(losses) * (1 + 1e-6)
    return found.clamp(min=torch.finfo(losses.dtype).tiny)  # losses of exactly 0 lie below it too


def _normalised(weights: Tensor) -> Tensor:
    total = weights.sum()
    return weights / (total + (total == 0))


def _hard(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return _normalised(hard_weights(losses, threshold(losses, setting.progress)))


def _linear(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return _normalised(linear_weights(losses, threshold(losses, setting.progress)))


SELF_PACED = Method(
    "self-paced", "easy examples first", "Kumar et al., NIPS 2010", always(weighted_step(_hard)), handles="noise"
)
SELF_PACED_LINEAR = Method(
    "self-paced-linear",
    "easy examples first, weights falling linearly with the loss",
    "Jiang et al., ACM MM 2014",
    always(weighted_step(_linear)),
    handles="noise",
)
