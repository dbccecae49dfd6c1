"""Bags of table rows by look-up and addition: torch's own bag has no forward mode and no second derivative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bags(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """As F.embedding_bag, with which the tests compare it; returns [bags, width]."""
    if max_norm is not None or scale_grad_by_freq or input.numel() == 0:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    starts = _starts(input, offsets, include_last_offset)
    tokens = input.flatten()
    places = torch.arange(tokens.numel(), device=input.device)
    bag = torch.searchsorted(starts, places, right=True) - 1
    counted = torch.ones_like(tokens, dtype=torch.bool)
    if padding_idx is not None:
        counted = tokens != padding_idx % weight.shape[0]
    if mode == "max":
        return _largest(tokens, weight, bag, counted, starts.numel())
    rows = F.embedding(tokens, weight, sparse=sparse) * counted.unsqueeze(1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.flatten().unsqueeze(1)
    total = rows.new_zeros(starts.numel(), weight.shape[1]).index_add(0, bag, rows)
    if mode == "sum":
        return total
    counts = torch.zeros_like(starts, dtype=rows.dtype).index_add(0, bag, counted.to(rows.dtype))
    return total / counts.clamp(min=1).unsqueeze(1)


def _starts(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Tensor:
    """Where each bag begins in the tokens."""
    if offsets is None:
        return torch.arange(0, input.numel(), input.shape[1], device=input.device)
    return (offsets[:-1] if include_last_offset else offsets).long()


def _largest(tokens: Tensor, weight: Tensor, bag: Tensor, counted: Tensor, bags: int) -> Tensor:
    """Every entry from the first row of its bag that holds the largest; zero in a bag without rows."""
    rows = F.embedding(tokens, weight).masked_fill(~counted.unsqueeze(1), -torch.inf)
    places = bag.unsqueeze(1).expand_as(rows)
    with torch.no_grad():
        empty = torch.full((bags, weight.shape[1]), -torch.inf, dtype=rows.dtype, device=rows.device)
        largest = empty.scatter_reduce(0, places, rows.detach(), "amax")
        order = torch.arange(tokens.numel(), device=tokens.device).unsqueeze(1).expand_as(rows)
        order = order.masked_fill(rows != largest[bag], tokens.numel())
        first = torch.full(largest.shape, tokens.numel(), device=tokens.device).scatter_reduce(0, places, order, "amin")
    held = (first < tokens.numel()) & largest.isfinite()
    return rows.masked_fill(~counted.unsqueeze(1), 0.0).gather(0, first.clamp(max=tokens.numel() - 1)) * held
