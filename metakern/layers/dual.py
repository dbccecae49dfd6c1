"""Dual numbers: tensors that carry a tangent."""

from __future__ import annotations

from typing import Any

import torch.autograd.forward_ad as forward_ad
from torch import Tensor


def is_dual(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
