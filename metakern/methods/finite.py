"""Losses, weights and predictions must be finite; those of a diverged run are not."""

from __future__ import annotations

from torch import Tensor


def require_finite(what: str, values: Tensor) -> None:
    """Raise ValueError unless values[n, ...], the `what` of each of n examples, are all finite."""
    broken = len((~values.isfinite()).nonzero()[:, 0].unique())
    if broken:
        raise ValueError(
            f"the {what} of {broken} of {len(values)} examples is not finite; a smaller --lr usually helps"
        )
