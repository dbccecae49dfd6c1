"""Which dimension of a layer's output separates the examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class ExampleAxis(NamedTuple):
    """Dimension `dim` of an output has size outer * n * inner, and the middle factor counts examples."""

    dim: int
    outer: int
    inner: int

    def folded(self, tensor: Tensor, examples: int) -> Tensor:
        """View `tensor` with that dimension split in three; the examples are at `dim + 1`."""
        return tensor.unflatten(self.dim, (self.outer, examples, self.inner))

    def spread(self, per_example: Tensor, shape: Sequence[int]) -> Tensor:
        """One value per example, repeated along dimension `dim` and broadcastable against an output of `shape`."""
        line = per_example.view(1, -1, 1).expand(self.outer, -1, self.inner).reshape(-1)
        return line.view([shape[self.dim] if d == self.dim else 1 for d in range(len(shape))])

    def total(self, tensor: Tensor, examples: int) -> Tensor:
        """Sum of `tensor` over everything but the examples."""
        folded = self.folded(tensor, examples)
        return folded.sum([d for d in range(folded.dim()) if d != self.dim + 1])

    @property
    def leading(self) -> bool:
        """Examples come first, each as one contiguous block."""
        return self.dim == 0 and self.outer == 1


class Kind(NamedTuple):
    """An axis without the sizes that vary from batch to batch."""

    dim: int
    fold: str  # "none", "inner", "outer", or "mixed" when both factors exceed 1


def candidates(shape: Sequence[int], examples: int) -> Iterator[ExampleAxis]:
    """Every way in which a dimension of `shape` may hold the examples, the usual ones first."""
    for dim, size in enumerate(shape):
        if size and size % examples == 0:
            rest = size // examples
            divisors = [d for d in range(1, math.isqrt(rest) + 1) if rest % d == 0]
            outers = sorted({*divisors, *(rest // d for d in divisors)})
            outers.sort(key=lambda outer: outer not in (1, rest))
            for outer in outers:
                yield ExampleAxis(dim, outer, rest // outer)


def kind_of(axis: ExampleAxis) -> Kind:
    if axis.outer > 1:
        return Kind(axis.dim, "outer" if axis.inner == 1 else "mixed")
    return Kind(axis.dim, "inner" if axis.inner > 1 else "none")


def sized(kind: Kind, shape: Sequence[int], examples: int) -> ExampleAxis | None:
    """The axis of that kind at these sizes; None if a size does not fit."""
    size = shape[kind.dim]
    rest, left = divmod(size, examples)
    if left or rest == 0 or kind.fold == "mixed" or (kind.fold == "none" and rest != 1):
        return None
    return ExampleAxis(kind.dim, rest, 1) if kind.fold == "outer" else ExampleAxis(kind.dim, 1, rest)
