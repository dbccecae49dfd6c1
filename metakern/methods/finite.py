"""Losses, weights and predictions that are no numbers any more: a run that has diverged says so."""

from __future__ import annotations

from torch import Tensor


def require_finite(what: str, values: Tensor) -> None:
    """Raise ValueError when values[n, ...], `what` each of n examples has, are not all finite."""
    broken = len((~values.isfinite()).nonzero()[:, 0].unique())
    if broken:
        raise ValueError(
            f"the {what} of {broken} of {len(values)} examples is not finite; a smaller --lr usually helps"
        )
