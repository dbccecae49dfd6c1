"""Class names to class numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def numbered(labels: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """targets[n] int64 and the class names: sorted, or of two classes the rarer first, as in all such sets here.

    Raises: ValueError unless there are at least two classes.
    """
    counts = Counter(labels)
    if len(counts) < 2:
        raise ValueError(f"there must be two classes at least, got {sorted(counts)}")
    names = sorted(counts, key=_in_order)
    if len(names) == 2:
        names.sort(key=lambda name: counts[name])
    numbers = {name: k for k, name in enumerate(names)}
    return torch.tensor([numbers[label] for label in labels]), tuple(names)


def _in_order(name: str) -> tuple[float, str]:
    """Numbers by value, then all other names ("nan" among them) alphabetically."""
    try:
        value = float(name)
    except ValueError:
        value = math.inf
    return (math.inf if math.isnan(value) else value), name
