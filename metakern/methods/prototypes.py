"""ProtoNet: a class is represented by the mean of its support examples' embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metakern.data import Examples


def prototype_logits(model: nn.Module, support: Examples, inputs: Tensor) -> Tensor:
    """z_qk = -|f(x_q) - p_k|^2, p_k the mean of f over the support examples of class k; inputs[q, ...] -> [q, K].

    `model` is the embedding f, inputs[n, ...] -> [n, d]. The targets of `support` are 0 .. K-1, each present at least
    once.
    Source: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning", NIPS 2017, equations 1 and 2.
    """
    embedded = model(torch.cat([support.inputs, inputs]))
    own, asked = embedded[: len(support)], embedded[len(support) :]
    counts = torch.bincount(support.targets)
    sums = own.new_zeros(len(counts), own.shape[1]).index_add(0, support.targets, own)
    prototypes = sums / counts.unsqueeze(1).to(own)
    return -(asked.unsqueeze(1) - prototypes).square().sum(2)
