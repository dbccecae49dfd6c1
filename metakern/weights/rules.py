"""Weight rules that need nothing but the dots."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern import ops


def clip_normalise(dots: Tensor) -> Tensor:
    """max(dots_n, 0) / (S + [S == 0]) with S = sum_n max(dots_n, 0); all zero if no example helps.

    Source: Ren et al., Learning to Reweight Examples for Robust Deep Learning, ICML 2018, algorithm 1, line 11.
    """
    return ops.clip_normalise(dots)


def unclipped(dots: Tensor) -> Tensor:
    """dots_n / (S + [S == 0]) with S = sum_n |dots_n|: harmful examples get negative weights."""
    total = dots.abs().sum()
    return dots / (total + (total == 0).to(total.dtype))


def softmax(dots: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax_n(dots_n / (temperature * s)), s the standard deviation of the dots, so that scale does not matter."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    scale = dots.std(correction=0)
    return torch.softmax(dots / (temperature * (scale + (scale == 0).to(scale.dtype))), 0)


def top_k(dots: Tensor, k: int) -> Tensor:
    """1/k for the k largest dots, 0 for the rest."""
    if not 1 <= k <= dots.numel():
        raise ValueError(f"k must be between 1 and the number of examples ({dots.numel()}), got {k}")
    weights = torch.zeros_like(dots)
    weights[dots.topk(k).indices] = 1 / k
    return weights


def floor(dots: Tensor, share: float = 0.1) -> Tensor:
    """v_n / sum_n v_n, v_n = max(dots_n, share * mean_n |dots_n|): no example is dropped; 1 / n if all dots are 0.

    The smallest weight is that of a dot of `share` times the mean absolute dot; if no dot is larger, all weights are
    equal. Source: none of the papers; users of L2RW ask for steps that drop no example.
    """
    if not share > 0:
        raise ValueError(f"share must be positive, got {share}")
    least = share * dots.abs().mean()
    kept = torch.maximum(dots, least) + (least == 0).to(dots.dtype)
    return kept / kept.sum()
