"""A pass that is run a second time must repeat the first."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.capture.host import may_look_at_values
from metakern.capture.refusal import EngineUnavailable


def agree(again: Tensor, values: Tensor) -> Tensor:
    """Where the values of two passes over one batch differ by no more than rounding, [...]."""
    share = {torch.float64: 1e-8, torch.float32: 1e-3}.get(values.dtype, 0.1)
    if torch.is_autocast_enabled(values.device.type):
        share = 0.1
    return ~((again - values).abs() > share * (1 + values.abs()))


def require_repetition(again: Tensor, values: Tensor) -> None:
    """Raise if two passes over one batch differ by more than rounding: the dots would not be those of the first."""
    if not may_look_at_values():
        return
    if again.shape != values.shape or not agree(again, values).all():
        raise EngineUnavailable(
            "two forward passes over the same batch do not agree, so the model draws from a random generator that is "
            "neither a global one of torch, Python or NumPy nor an attribute of a module, or it keeps state between "
            "calls, or it writes into its batch; forward mode and micro_batch need a pass that can be repeated "
            "(engine='double_backward' does not)"
        )
