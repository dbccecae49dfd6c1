"""MentorNet: a small network, trained beforehand, that weights examples by their loss and the course of training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MentorNet(nn.Module):
    """losses[n], differences[n] to the running percentile, labels[n] int64, epoch 0..99 -> logits of the weights[n].

    Loss and difference are the one step of a bidirectional LSTM with one unit in each direction. The label has an
    embedding of width 2, the epoch a fixed one of width 5. One hidden layer of 20 units.
    Source: Jiang et al., "MentorNet", ICML 2018, figure 3, and its published code.
    """

    def __init__(self, labels: int = 2) -> None:
        super().__init__()
        self.course = nn.LSTM(2, 1, bidirectional=True, batch_first=True)
        self.label, self.epoch = nn.Embedding(labels, 2), nn.Embedding(100, 5)
        self.epoch.weight.requires_grad_(False)
        self.hidden, self.out = nn.Linear(2 + 2 + 5, 20), nn.Linear(20, 1)

    def forward(self, losses: Tensor, differences: Tensor, labels: Tensor, epochs: Tensor) -> Tensor:
        course, _ = self.course(torch.stack([losses, differences], 1).unsqueeze(1))
        seen = torch.cat([course.squeeze(1), self.label(labels), self.epoch(epochs)], 1)
        return self.out(torch.tanh(self.hidden(seen))).squeeze(1)


def predefined_curriculum(differences: Tensor, *, width: float = 1.0) -> Tensor:
    """v = clip(1 - d / width, 0, 1), d the loss minus the running percentile; width 0: v = [d <= 0]; -> [n].

    Source: as `MentorNet`, equation 5 with lambda_1 the percentile and lambda_2 the width.
    """
    return (differences <= 0).to(differences) if width == 0 else (1 - differences / width).clamp(0, 1)


class Percentile:
    """A running percentile of the losses, p <- decay p + (1 - decay) percentile of the batch, from that of the first.

    Source: the code published with MentorNet: percentile 0.75 in its commands for PD; decay 0.9, the default of its
    function, where its training script passes 0.5.
    """

    def __init__(self, share: float = 0.75, decay: float = 0.9) -> None:
        self.share, self.decay, self.value = share, decay, float("nan")

    def differences(self, losses: Tensor) -> Tensor:
        """losses[n] minus the percentile, which is first updated with this batch, [n]."""
        now = float(torch.quantile(losses.float(), self.share))
        self.value = now if self.value != self.value else self.decay * self.value + (1 - self.decay) * now
        return losses - self.value


Lesson = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # losses, differences, labels, epochs, weights wanted; each [n]


def made_up_lessons(generator: torch.Generator, *, width: float = 1.0, size: int = 256) -> Iterator[Lesson]:
    """Endless synthetic lessons: losses in 0..6 around percentiles in 0..3, each with its predefined weight."""
    while True:
        losses = 6 * torch.rand(size, generator=generator)
        differences = losses - 3 * torch.rand(size, generator=generator)
        epochs = torch.randint(100, (size,), generator=generator)
        labels = torch.zeros(size, dtype=torch.int64)
        yield losses, differences, labels, epochs, predefined_curriculum(differences, width=width)


def taught(mentor: MentorNet, lessons: Iterator[Lesson], *, steps: int, lr: float = 0.01) -> MentorNet:
    """The mentor after `steps` steps of Adam on the cross entropy of its weights to the wanted ones, in eval mode."""
    optimizer = torch.optim.Adam([p for p in mentor.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        *seen, wanted = next(lessons)
        optimizer.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(mentor(*seen), wanted).backward()
        optimizer.step()
    return mentor.eval()
