"""Endless streams of row numbers for mini-batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _cycle(rows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield rows[torch.randperm(len(rows), generator=generator)]


def _chunks(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Chunks of exactly `size` from one permutation of `rows` after another; a chunk may span two of them."""
    permutations = _cycle(rows, generator)
    left = next(permutations)
    while True:
        while len(left) < size:
            left = torch.cat([left, next(permutations)])
        yield left[:size]
        left = left[size:]


def shuffled(targets: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers [batch_size] int64: every example once per epoch; no batch is short, or larger than the set."""
    return _chunks(torch.arange(len(targets)), min(batch_size, len(targets)), generator)


def class_balanced(targets: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers, batch_size / C of each class present; the first classes get what remains of the division.

    Within a class, no example is repeated before all others have been used.
    """
    present = targets.unique().tolist()
    sizes = [batch_size // len(present) + (k < batch_size % len(present)) for k in range(len(present))]
    streams = [
        _chunks((targets == target).nonzero().squeeze(1), size, generator)
        for target, size in zip(present, sizes, strict=True)
        if size
    ]
    while True:
        rows = torch.cat([next(stream) for stream in streams])
        yield rows[torch.randperm(len(rows), generator=generator)]
