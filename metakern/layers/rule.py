"""One signature for every layer: what a use does with a direction, and with weighted output gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metakern.capture.record import Call, Record

Tangents = Mapping[int, Tensor]  # identity of a trainable tensor -> V, the direction in it
Gradients = dict[int, Tensor]  # identity of a trainable tensor -> its gradient


def added(left: Tensor, right: Tensor) -> Tensor:
    """Torch adds sparse tensors to dense ones, not the other way round."""
    return right + left if left.is_sparse else left + right


@dataclass(frozen=True)
class Weights:
    """The weights of one batch, and the rows that are not zero where the host knows them."""

    values: Tensor  # [n]
    kept: Tensor | None  # indices of the non-zero weights, None when they are not known or all are kept
    # What uses before this one gave, by parameter. A rule may take an entry out, and return its gradient added to that.
    total: Gradients = field(default_factory=dict)
    own: set[int] = field(default_factory=set)  # parameters whose entry nobody else holds

    @property
    def examples(self) -> int:
        return self.values.shape[0]

    def add(self, key: int, grad: Tensor, fresh: bool) -> None:
        """What one use gave for a parameter."""
        if key in self.total:
            grad, fresh = added(self.total[key], grad), True
        self.total[key] = grad
        (self.own.add if fresh else self.own.discard)(key)

    def taken_to_write(self, key: int, dtype: torch.dtype) -> Tensor | None:
        """What uses before this one gave, taken out, in this dtype and to be written into; None where there is nothing,
        or it would be rounded, or it is sparse. An entry that others may hold is copied.
        """
        there = self.total.get(key)
        if there is None or there.is_sparse or torch.promote_types(there.dtype, dtype) != dtype:
            return None
        return self.total.pop(key).to(dtype, copy=key not in self.own)


@dataclass(frozen=True)
class LayerRule:
    """How one kind of call takes part.

    applies(call)                whether the rule covers this call; the generic rule covers the rest
    dots(record, V, n)           -> [n], sum over positions of <B_n, d output_n / d parameters . V>
    weighted_grads(record, w)    -> sum_n w_n B_n^T d output_n / d parameters, by parameter
    matrices(record, n)          -> A[n,t,i], B[n,t,o] when the use is a matrix product with its weight
    per_example(record, n)       -> G[n,numbers] by parameter where that is cheaper than several answers from A and B,
                                    else None
    by_example                   form these in any pass, as B comes by, so that A and B need not be kept
    fresh                        every tensor that weighted_grads returns is made there, one for each parameter, and
                                 held by nobody else: rules of other uses may write into it
    """

    applies: Callable[[Call], bool]
    dots: Callable[[Record, Tangents, int], Tensor]
    weighted_grads: Callable[[Record, Weights], Gradients]
    matrices: Callable[[Record, int], tuple[Tensor, Tensor]] | None = None
    per_example: Callable[[Record, int], Gradients | None] | None = None
    by_example: bool = False
    fresh: bool = False
