"""Dual numbers: tensors that carry a tangent."""

from __future__ import annotations

from typing import Any

import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from metakern.capture.layout import is_sparse


def is_dual(value: Any) -> bool:
    return isinstance(value, Tensor) and unpacked(value)[1] is not None


def unpacked(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent; a sparse tensor has none, and torch fails when asked."""
    return (tensor, None) if is_sparse(tensor) else forward_ad.unpack_dual(tensor)
