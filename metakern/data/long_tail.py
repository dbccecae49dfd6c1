"""How many examples each class keeps: exponential long tail, step, one large class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def long_tail_counts(available: Tensor, factor: float) -> Tensor:
    """n_c = floor(n_max * factor^(-c / (C - 1))), n_max the smallest class's count; available[C] -> [C] int64.

    factor is the ratio of the largest class to the smallest. It is n mu^c with mu = factor^(-1 / (C - 1)).
    Raises: ValueError when factor is below 1 or a class would be left empty.
    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, section 5.1.
    """
    _require(factor)
    classes = len(available)
    shares = factor ** -(torch.arange(classes).double() / max(classes - 1, 1))
    return _filled((int(available.min()) * shares + 1e-9).long(), factor)


def step_counts(available: Tensor, factor: float, *, minority: float = 0.5) -> Tensor:
    """The first classes keep n_max, the last share `minority` of them floor(n_max / factor); [C] int64.

    Raises: as `long_tail_counts`.
    Source: Buda et al., "A systematic study of the class imbalance problem in CNNs", 2018, section 3.1.
    """
    _require(factor)
    counts = torch.full((len(available),), int(available.min()))
    counts[len(available) - round(minority * len(available)) :] = int(int(available.min()) / factor + 1e-9)
    return _filled(counts, factor)


def one_large_counts(available: Tensor, factor: float) -> Tensor:
    """The first class keeps n_max, all others floor(n_max / factor); [C] int64.

    Raises: as `long_tail_counts`.
    Source: Bansal et al., "MetaBalance", 2021: one class of 5000 and nine of 5 (there the large one is drawn).
    """
    return step_counts(available, factor, minority=1 - 1 / len(available))


SHAPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "exponential": long_tail_counts,
    "step": step_counts,
    "one-large": one_large_counts,
}


def _require(factor: float) -> None:
    if factor < 1:
        raise ValueError(f"imbalance factor must be at least 1, got {factor}")


def _filled(counts: Tensor, factor: float) -> Tensor:
    if int(counts.min()) < 1:
        raise ValueError(f"imbalance factor {factor:g} leaves a class without examples: {counts.tolist()}")
    return counts
