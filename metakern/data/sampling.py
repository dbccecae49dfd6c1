"""Endless streams of row numbers for mini-batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class _Rows:
    """Rows from one permutation after another: none is repeated before all have been taken."""

    def __init__(self, rows: Tensor, generator: torch.Generator) -> None:
        self._rows, self._generator, self._left = rows, generator, rows[:0]

    def take(self, size: int) -> Tensor:
        while len(self._left) < size:
            order = torch.randperm(len(self._rows), generator=self._generator)
            self._left = torch.cat([self._left, self._rows[order]])
        taken, self._left = self._left[:size], self._left[size:]
        return taken


def shuffled(targets: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers [batch_size] int64: every example once per epoch; no batch is short, or larger than the set."""
    rows, size = _Rows(torch.arange(len(targets)), generator), min(batch_size, len(targets))
    while True:
        yield rows.take(size)


def class_balanced(targets: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers, batch_size / C of each class present; what remains of the division goes to other classes each time,
    so that all are seen equally often, also if there are more classes than rows in a batch.

    Within a class, no example is repeated before all others have been used.
    """
    classes = [_Rows((targets == target).nonzero().squeeze(1), generator) for target in targets.unique().tolist()]
    each, over = divmod(batch_size, len(classes))
    first = 0  # of the classes that have a row more
    while True:
        more = [(k - first) % len(classes) < over for k in range(len(classes))]
        rows = torch.cat([rows.take(each + one) for rows, one in zip(classes, more, strict=True)])
        first = (first + over) % len(classes)
        yield rows[torch.randperm(len(rows), generator=generator)]
