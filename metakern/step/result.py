"""What the public functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Dots(NamedTuple):
    """dots_n = <grad l_n, grad mean_j l'_j> of one batch, [n]: positive where a step on the example helps.

    With `pairwise`, dots_nj = <grad l_n, grad l'_j>, [n, m].

    Unit: loss^2 per parameter^2; float32 (float64 for float64 losses).
    """

    dots: Tensor  # [n], or [n, m]
    losses: Tensor  # [n]
    meta_loss: Tensor  # []
    engine: str


class StepResult(NamedTuple):
    """Outcome of a re-weighted step; every tensor is detached."""

    weights: Tensor  # [n]
    dots: Tensor  # [n], see Dots
    losses: Tensor  # [n], before the step
    meta_loss: Tensor  # [], mean over the meta batch, before the step
    engine: str  # "ghost", "jvp", "double_backward"; "ghost_frozen": dots and weights are approximate
