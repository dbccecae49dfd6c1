"""Packed sequences in forward mode: torch's own packing has no forward-mode formula, but its parts have."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """[t, n, ...] with descending lengths -> the rows of position 0, position 1, and so on; and how many each has."""
    by_position = input.transpose(0, 1) if batch_first else input
    held = [int((lengths > t).sum()) for t in range(int(lengths.max()))]
    return torch.cat([by_position[t, :rows] for t, rows in enumerate(held)]), torch.tensor(held, device="cpu")


def padded(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    """The inverse: [t, n, ...], `padding_value` where a sequence has ended, and the lengths [n]."""
    held = batch_sizes.tolist()
    examples, positions = held[0], max(total_length, len(held))
    rows = data.split(held)
    ends = [data.new_full((examples - part.shape[0], *data.shape[1:]), padding_value) for part in rows]
    empty = [data.new_full((examples, *data.shape[1:]), padding_value)] * (positions - len(held))
    padded = torch.stack([*(torch.cat(pair) for pair in zip(rows, ends)), *empty])
    lengths = torch.tensor([sum(rows > n for rows in held) for n in range(examples)], device="cpu")
    return (padded.transpose(0, 1) if batch_first else padded), lengths
