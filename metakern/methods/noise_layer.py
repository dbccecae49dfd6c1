"""Noise layers learned with the network: Sukhbaatar's stochastic matrix and the complex noise adaptation layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def onto_simplex(rows: Tensor) -> Tensor:
    """The nearest distribution to each row (Euclidean projection), rows[k, C] -> [k, C]: entries at least 0, sums 1.

    Source: Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", ICML 2008, figure 1.
    """
    # The result does not depend on a shift; without it the 1 would be lost beside large entries.
    rows = rows - rows.amax(1, keepdim=True)
    descending = rows.sort(1, descending=True).values
    excess = descending.cumsum(1) - 1
    ranks = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    kept = (descending * ranks > excess).sum(1, keepdim=True)
    return (rows - excess.gather(1, kept - 1) / kept).clamp(min=0)


class StochasticMatrix(nn.Module):
    """channel[C, C], initialised to the identity; after each step its rows are projected back to distributions.

    Without regularisation it stays the identity and the network fits the noise; the penalty on its trace makes it
    absorb the noise.
    Source: Sukhbaatar et al., "Training Convolutional Networks with Noisy Labels", ICLR workshop 2015, section 3.1.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.channel = nn.Parameter(torch.eye(classes))

    def forward(self) -> Tensor:
        return self.channel

    @torch.no_grad()
    def project(self) -> None:
        """Project every row to the nearest distribution."""
        self.channel.copy_(onto_simplex(self.channel))


def stochastic_loss(logits: Tensor, targets: Tensor, channel: Tensor, *, trace: float = 0.1) -> Tensor:
    """l_n = -log sum_k q_n[k] channel[k, y_n] + trace * mean_k channel[k, k]; logits[n, C], channel[C, C] -> [n].

    Entries of the channel may be 0, so this is not computed in logs. Likelihoods are bounded below by about 1e-4, which
    bounds the step that one contradicting label can cause.
    Source: as `StochasticMatrix`, equation 3; the paper names the trace and weight decay as alternatives.
    """
    likelihood = (logits.softmax(1) * channel[:, targets].T).sum(1)
    return -(likelihood + 1e-4).log() + trace * channel.diagonal().mean()


class SoftmaxChannel(nn.Module):
    """The S-Model's channel: free parameters [C, C], initialised to `logits`; the softmax of each row is the channel.

    Source: Goldberger, Ben-Reuven, "Training Deep Neural-Networks Using a Noise Adaptation Layer", ICLR 2017, eq. 7.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self) -> Tensor:
        return self.logits


class ComplexNoise(nn.Module):
    """P(label j | true class k, features h) = softmax_j(u_kj . h + b_kj); features[n, d] -> [n, C, C].

    u is initialised to 0 and b to the logits of a channel, so that at first all examples have the same channel.
    Source: Goldberger, Ben-Reuven, "Training Deep Neural-Networks Using a Noise Adaptation Layer", ICLR 2017, eq. 8.
    """

    def __init__(self, features: int, logits: Tensor) -> None:
        super().__init__()
        classes = len(logits)
        self.layer = nn.Linear(features, classes * classes)
        nn.init.zeros_(self.layer.weight)
        with torch.no_grad():
            self.layer.bias.copy_(logits.flatten())

    def forward(self, features: Tensor) -> Tensor:
        classes = round(self.layer.out_features**0.5)
        return self.layer(features).view(len(features), classes, classes).log_softmax(2)


def complex_noise_loss(logits: Tensor, targets: Tensor, log_channels: Tensor) -> Tensor:
    """l_n = -log sum_k q_n[k] exp(log_channels[n, k, y_n]); logits[n, C], log_channels[n, C, C] -> [n].

    Source: as `ComplexNoise`.
    """
    own = log_channels[torch.arange(len(targets)), :, targets]
    return -torch.logsumexp(F.log_softmax(logits, 1) + own, 1)
