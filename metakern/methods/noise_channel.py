"""Losses that take the noise channel into account, and estimates of the channel with or without clean examples."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_corrected_loss(logits: Tensor, targets: Tensor, channel: Tensor) -> Tensor:
    """l_n = -log sum_k q_n[k] channel[k, y_n]; logits[n, C], targets[n], channel[C, C] with rows summing to 1 -> [n].

    channel[k, j] is the probability that true class k is labelled j. Computed in logs, so that a small q is not rounded
    to 0.
    Raises: ValueError if channel is not [C, C].
    Source: Patrini et al., "Making Deep Neural Networks Robust to Label Noise", CVPR 2017, theorem 2.
    """
    classes = logits.shape[1]
    if channel.shape != (classes, classes):
        raise ValueError(f"forward_corrected_loss: channel must be [{classes}, {classes}], got {list(channel.shape)}")
    return -torch.logsumexp(F.log_softmax(logits, 1) + channel.to(logits).log().T[targets], 1)


def channel_logits(classes: int, noise: float) -> Tensor:
    """The S-Model's free parameters [C, C] for uniform noise: the softmax of each row is 1 - noise on the diagonal.

    Raises: ValueError if noise is not in (0, 1).
    Source: Goldberger, Ben-Reuven, "Training Deep Neural-Networks Using a Noise Adaptation Layer", ICLR 2017.
    """
    if not 0 < noise < 1:
        raise ValueError(f"channel_logits: noise must be between 0 and 1, got {noise}")
    off = math.log(noise / (classes - 1))
    return torch.full((classes, classes), off).fill_diagonal_(math.log(1 - noise))


def channel_logits_from_confusion(predicted: Tensor, targets: Tensor, classes: int, *, floor: float = 1e-4) -> Tensor:
    """The "+Conf" initialisation of the S-Model: logs of how often prediction k has label j, rows normalised; [C, C].

    Source: as `channel_logits`, section 3.
    """
    counts = torch.bincount(predicted * classes + targets, minlength=classes * classes).view(classes, classes)
    rows = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return (rows + floor).log()


def s_model_loss(logits: Tensor, targets: Tensor, channel: Tensor) -> Tensor:
    """Forward correction by the channel softmax(channel)[k, :], whose logits [C, C] are learned along with the network.

    At test time, the network's own prediction q is used.
    Source: as `channel_logits`, equation 7, the simple variant.
    """
    return forward_corrected_loss(logits, targets, channel.softmax(1))


def glc_channel(noisy_probabilities: Tensor, clean_targets: Tensor) -> Tensor:
    """channel[k, :] = mean prediction of a network trained on noisy labels, over the clean examples of class k; [C, C].

    A class without clean examples gets the row of the identity.
    Source: Hendrycks et al., "Using Trusted Data to Train Deep Networks on Labels Corrupted by Severe Noise", NeurIPS
    2018, section 3.
    """
    classes = noisy_probabilities.shape[1]
    sums = noisy_probabilities.new_zeros(classes, classes).index_add_(0, clean_targets, noisy_probabilities)
    counts = torch.bincount(clean_targets, minlength=classes).unsqueeze(1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), torch.eye(classes).to(sums))


def confusion_channel(predicted: Tensor, clean_targets: Tensor, classes: int, *, smoothing: float = 0.01) -> Tensor:
    """channel[k, j] = share of the clean examples of class k that a network trained on noisy labels calls j; [C, C].

    Rows are mixed with the uniform distribution by `smoothing`, so that no label is impossible.
    Source: the "confusion matrix" baseline of Hendrycks et al., as `glc_channel`.
    """
    counts = torch.bincount(clean_targets * classes + predicted, minlength=classes * classes).view(classes, classes)
    held = counts.sum(1, keepdim=True)
    shares = torch.where(held > 0, counts / held.clamp(min=1), torch.eye(classes, device=counts.device))
    return (1 - smoothing) * shares + smoothing / classes


def anchor_channel(noisy_probabilities: Tensor, *, quantile: float = 0.97) -> Tensor:
    """channel[k, :] = prediction for the example at that quantile of the probabilities of k; needs no clean labels.

    noisy_probabilities[n, C] of a network trained on noisy labels -> [C, C]. That example is assumed to be of class k
    with certainty, so that its prediction is the distribution of the labels of class k.
    Source: Patrini et al., as `forward_corrected_loss`, section 5 (theorem 3 has the maximum, the code the quantile).
    """
    rows = [
        (column - torch.quantile(column, quantile, interpolation="higher")).abs().argmin()
        for column in noisy_probabilities.T
    ]
    return noisy_probabilities[torch.stack(rows)]


def reverse_channel(channel: Tensor, label_shares: Tensor) -> Tensor:
    """P(true class k | label j), [C labels, C classes], from channel[k, j] and the shares of the labels [C].

    The shares of the true classes are those that would give `label_shares` (least squares, clipped to be positive);
    then Bayes' rule.
    """
    truth = torch.linalg.lstsq(channel.double().T, label_shares.double().unsqueeze(1)).solution.squeeze(1)
    joint = truth.clamp(min=1e-6).unsqueeze(1) * channel.double()
    return (joint / joint.sum(0)).T.to(channel)


def top_down_loss(logits: Tensor, targets: Tensor, reverse: Tensor) -> Tensor:
    """l_n = -sum_k reverse[y_n, k] log q_n[k]: cross entropy to the classes that the label makes likely; -> [n].

    Source: the top-down noise model of Sukhbaatar et al., "Training Convolutional Networks with Noisy Labels", 2014.
    """
    return -(reverse.to(logits)[targets] * F.log_softmax(logits, 1)).sum(1)


def glc_loss(logits: Tensor, targets: Tensor, is_clean: Tensor, channel: Tensor) -> Tensor:
    """Cross entropy for the clean examples, forward correction for the others; is_clean[n] bool -> [n].

    Source: as `glc_channel`.
    """
    return torch.where(
        is_clean, F.cross_entropy(logits, targets, reduction="none"), forward_corrected_loss(logits, targets, channel)
    )
