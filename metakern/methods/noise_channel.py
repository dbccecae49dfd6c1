"""Losses that know how labels were corrupted: forward correction, the S-Model's learned channel, and GLC's estimate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_corrected_loss(logits: Tensor, targets: Tensor, channel: Tensor) -> Tensor:
    """l_n = -log sum_k q_n[k] channel[k, y_n]; logits[n, C], targets[n], channel[C, C] rows summing to 1 -> [n].

    channel[k, j] is the probability that true class k was labelled j. In logs, so that a small q is not rounded to 0.
    Raises: ValueError when channel is not [C, C].
    Source: Patrini et al., "Making Deep Neural Networks Robust to Label Noise", CVPR 2017, theorem 2.
    """
    classes = logits.shape[1]
    if channel.shape != (classes, classes):
        raise ValueError(f"forward_corrected_loss: channel must be [{classes}, {classes}], got {list(channel.shape)}")
    return -torch.logsumexp(F.log_softmax(logits, 1) + channel.to(logits).log().T[targets], 1)


def channel_logits(classes: int, noise: float) -> Tensor:
    """Free parameters [C, C] of the S-Model at a uniform noise share: softmax of a row is 1 - noise on the diagonal.

    Raises: ValueError when noise is not in (0, 1).
    Source: Goldberger, Ben-Reuven, "Training Deep Neural-Networks Using a Noise Adaptation Layer", ICLR 2017.
    """
    if not 0 < noise < 1:
        raise ValueError(f"channel_logits: noise must be between 0 and 1, got {noise}")
    off = math.log(noise / (classes - 1))
    return torch.full((classes, classes), off).fill_diagonal_(math.log(1 - noise))


def channel_logits_from_confusion(predicted: Tensor, targets: Tensor, classes: int, *, floor: float = 1e-4) -> Tensor:
    """The S-Model's "+Conf" start: logs of how often prediction k came with label j, rows normalised; [C, C].

    Source: as `channel_logits`, section 3.
    """
    counts = torch.bincount(predicted * classes + targets, minlength=classes * classes).view(classes, classes)
    rows = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return (rows + floor).log()


def s_model_loss(logits: Tensor, targets: Tensor, channel: Tensor) -> Tensor:
    """Forward correction by the channel softmax(channel)[k, :], whose logits [C, C] are learned with the network.

    At test time the network's own prediction q is used.
    Source: as `channel_logits`, equation 7, the simple variant.
    """
    return forward_corrected_loss(logits, targets, channel.softmax(1))


def glc_channel(noisy_probabilities: Tensor, clean_targets: Tensor) -> Tensor:
    """channel[k, :] = mean over clean examples of class k of what a network trained on noisy labels predicts; [C, C].

    A class without clean examples keeps the identity's row.
    Source: Hendrycks et al., "Using Trusted Data to Train Deep Networks on Labels Corrupted by Severe Noise",
    NeurIPS 2018, section 3.
    """
    classes = noisy_probabilities.shape[1]
    sums = noisy_probabilities.new_zeros(classes, classes).index_add_(0, clean_targets, noisy_probabilities)
    counts = torch.bincount(clean_targets, minlength=classes).unsqueeze(1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), torch.eye(classes).to(sums))


def glc_loss(logits: Tensor, targets: Tensor, is_clean: Tensor, channel: Tensor) -> Tensor:
    """Cross entropy for the clean examples, forward correction for the others; is_clean[n] bool -> [n].

    Source: as `glc_channel`.
    """
    return torch.where(
        is_clean, F.cross_entropy(logits, targets, reduction="none"), forward_corrected_loss(logits, targets, channel)
    )
