"""How many support examples each class of a few-shot episode has: linear, step, random, long-tail, balanced."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SHOT_SHAPES = ("balanced", "linear", "step", "random", "long-tail")


def shots(
    shape: str,
    way: int,
    generator: torch.Generator,
    *,
    fewest: int = 1,
    most: int = 9,
    minority: float = 0.2,
    exponent: float = 3.0,
) -> Tensor:
    """Support examples k_c of each of `way` classes, [way] int64; only "random" draws from `generator`.

    balanced    k_c = floor((fewest + most) / 2)
    linear      k_c = round(an even grid of `way` values from fewest - 0.49 to most + 0.49)
    step        fewest for the first floor(minority way) classes, most for the others
    random      each k_c uniform in fewest .. most
    long-tail   k_c = floor(most ((1 - r) x_c^exponent + r)), x_c an even grid from 0 to 1, r = fewest / most

    Raises: ValueError naming the argument that is out of its range.
    Source: Ochal et al., "Few-Shot Learning with Class Imbalance", 2021, and the code published with it.
    """
    _require(shape, way, fewest, most, minority, exponent)
    if shape == "balanced":
        return torch.full((way,), (fewest + most) // 2)
    if shape == "linear":
        return torch.from_numpy(np.around(np.linspace(fewest - 0.49, most + 0.49, way)).astype(np.int64))
    if shape == "step":
        counts = torch.full((way,), most)
        # A share such as 0.6 of 5 classes must not come out below 3 by rounding.
        counts[: int(minority * way + 1e-9)] = fewest
        return counts
    if shape == "random":
        return torch.randint(fewest, most + 1, (way,), generator=generator)
    share = fewest / most
    curve = (1 - share) * np.linspace(0, 1, way) ** exponent + share
    return torch.from_numpy((most * curve + 1e-9).astype(np.int64))


def _require(shape: str, way: int, fewest: int, most: int, minority: float, exponent: float) -> None:
    if shape not in SHOT_SHAPES:
        raise ValueError(f"shots: shape must be one of {', '.join(SHOT_SHAPES)}, got {shape!r}")
    if way < 2:
        raise ValueError(f"shots: way must be at least 2 classes, got {way}")
    if not 1 <= fewest <= most:
        raise ValueError(f"shots: fewest and most must be 1 <= fewest <= most, got {fewest} and {most}")
    if not 0 <= minority <= 1:
        raise ValueError(f"shots: minority must be a share of the classes, from 0 to 1, got {minority}")
    if not exponent > 0:
        raise ValueError(f"shots: exponent must be above 0, got {exponent}")
