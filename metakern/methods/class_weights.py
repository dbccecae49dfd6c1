"""Weights by class counts: inverse frequency, its square root, and the effective number of examples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metakern.methods.method import Method, Setting, always
from metakern.methods.weighted_step import Rule, weighted_step


def _scaled(weights: Tensor, counts: Tensor) -> Tensor:
    weights = torch.where(counts > 0, weights, 0)
    return (weights * (counts > 0).sum() / weights.sum()).float()


def inverse_frequency(counts: Tensor, *, power: float = 1.0) -> Tensor:
    """w_c = n_c^-power, scaled so that the classes present have mean 1; counts[C] -> [C] float32, 0 for absent classes.

    power 1 is the inverse frequency, 1/2 the inverse square root.
    """
    return _scaled(counts.double() ** -power, counts)


def effective_number(counts: Tensor, *, beta: float = 0.9999) -> Tensor:
    """w_c = (1 - beta) / (1 - beta^n_c), scaled so that the classes present have mean 1; counts[C] -> [C] float32.

    beta 0 gives equal weights, beta -> 1 the inverse frequency.
    Raises: ValueError when beta is not in [0, 1).
    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, equation 2.
    """
    require_beta(beta)
    if beta == 0:
        return _scaled(torch.ones(len(counts), dtype=torch.float64), counts)
    # 1 - beta^n by expm1: for beta near 1 and few examples the subtraction would leave nothing.
    return _scaled(-(1 - beta) / torch.expm1(counts.double() * math.log(beta)), counts)


def by_class(class_weights: Tensor, targets: Tensor) -> Tensor:
    """w_n = class_weights[y_n], normalised to sum 1 over the batch, as in `cross_entropy(weight=...)`."""
    weights = class_weights[targets]
    return weights / weights.sum()


def _inverse_sqrt(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return by_class(inverse_frequency(setting.class_counts, power=0.5).to(losses), targets)


def class_balanced_rule(beta: float = 0.9999) -> Rule:
    """The rule that weights each example by the effective number of its class."""

    def rule(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
        return by_class(effective_number(setting.class_counts, beta=beta).to(losses), targets)

    return rule


@dataclass(frozen=True)
class EffectiveNumberSettings:
    """beta: near 1, weights are near the inverse frequency; the paper tries 0.9, 0.99, 0.999 and 0.9999."""

    beta: float = 0.9999

    def __post_init__(self) -> None:
        require_beta(self.beta)


def require_beta(beta: float) -> None:
    """Raises: ValueError for a beta outside [0, 1)."""
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")


def class_balanced(settings: EffectiveNumberSettings) -> Method:
    """Weights by the effective number, with the given settings."""
    return Method(
        "class-balanced",
        "weights by the effective number of examples, beta 0.9999",
        "Cui et al., CVPR 2019",
        always(weighted_step(class_balanced_rule(settings.beta))),
        settings=settings,
        rebuilt=class_balanced,
    )


INVERSE_SQRT = Method(
    "inverse-sqrt",
    "weights by 1 / sqrt(class count)",
    "Mahajan et al., ECCV 2018",
    always(weighted_step(_inverse_sqrt)),
)
CLASS_BALANCED = class_balanced(EffectiveNumberSettings())
