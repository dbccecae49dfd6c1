"""The label net of meta label correction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelNet(nn.Module):
    """Given label y and features h of an example, a distribution over labels.

    o = W3 tanh(W2 tanh(W1 [h, e_y] + b1) + b2) + b3,  p = softmax(o);  with `skip`, a onehot(y) + (1 - a) softmax(o)
    where a = sigmoid of an extra output, so that even an untrained net can keep a label.

    Called as `net(labels [n], features [n, F])`, or `net(labels)` when built with `features=0`; returns [n, C].

    Source: Zheng et al., Meta Label Correction for Noisy Label Learning, AAAI 2021, section 3.
    """

    def __init__(
        self, classes: int, features: int = 0, *, hidden: int = 128, embedding: int = 128, skip: bool = False
    ) -> None:
        super().__init__()
        self.classes, self.skip = classes, skip
        self.embedding = nn.Embedding(classes, embedding)
        self.layers = nn.Sequential(
            *(nn.Linear(features + embedding, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()),
            nn.Linear(hidden, classes + skip),
        )

    def forward(self, labels: Tensor, features: Tensor | None = None) -> Tensor:
        given = self.embedding(labels)
        output = self.layers(given if features is None else torch.cat([features, given], 1))
        proposed = torch.softmax(output[:, : self.classes], 1)
        if not self.skip:
            return proposed
        keep = torch.sigmoid(output[:, self.classes :])
        return keep * F.one_hot(labels, self.classes).to(proposed.dtype) + (1 - keep) * proposed
