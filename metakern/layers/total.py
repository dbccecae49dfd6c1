"""The sum over the uses of a pass so far, by parameter; a rule may add its share to it in place."""

from __future__ import annotations

import torch
from torch import Tensor


def added(left: Tensor, right: Tensor) -> Tensor:
    """torch adds sparse tensors to dense ones, not the other way round."""
    return right + left if left.is_sparse else left + right


class Total:
    """Gradients by identity of the parameter. A rule that takes one out returns it with its own share added."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}
        self._own: set[int] = set()  # parameters whose entry nobody else holds

    def add(self, key: int, grad: Tensor, fresh: bool = False) -> None:
        """Add the gradient of one use for a parameter; `fresh`: nobody else holds it."""
        if key in self.found:
            grad, fresh = added(self.found[key], grad), True
        self.found[key] = grad
        (self._own.add if fresh else self._own.discard)(key)

    def take(self, key: int, dtype: torch.dtype) -> Tensor | None:
        """Return the sum so far, which the caller must not write into, and forget it; None if there is none, or it is
        sparse or of another dtype.
        """
        there = self.found.get(key)
        return None if there is None or there.is_sparse or there.dtype != dtype else self.found.pop(key)

    def take_to_write(self, key: int, dtype: torch.dtype) -> Tensor | None:
        """The sum so far in this dtype, a copy if others may hold it; None if there is none, or it is sparse or would
        be rounded.
        """
        there = self.found.get(key)
        if there is None or there.is_sparse or torch.promote_types(there.dtype, dtype) != dtype:
            return None
        return self.found.pop(key).to(dtype, copy=key not in self._own)
