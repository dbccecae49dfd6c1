"""The three reductions that a re-weighted step needs over a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_group(tensors: dict[Any, Tensor], group: Any) -> None:
    """Average V over the group, in place: the meta loss is the mean over the meta batches of all ranks.

    Every rank must hold the same parameters, and its meta batch the same number of examples.
    """
    if group is None:
        return
    for tensor in tensors.values():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
        tensor.div_(dist.get_world_size(group))


def sum_over_group(tensors: dict[Any, Tensor], group: Any) -> None:
    """Sum weighted gradients over the group, in place; sparse ones, whose rows differ between ranks, become dense."""
    if group is not None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to_dense()
            dist.all_reduce(tensors[name], op=dist.ReduceOp.SUM, group=group)


def weights_over_group(rule: Callable[[Tensor], Tensor], dots: Tensor, group: Any) -> Tensor:
    """Apply a weight rule to the dots of all ranks at once and return this rank's part."""
    if group is None:
        return rule(dots)
    counts: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(counts, dots.shape[0], group=group)
    padded = torch.cat([dots, dots.new_zeros(max(counts) - dots.shape[0])])  # gather wants equal sizes
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    everywhere = torch.cat([part[:count] for part, count in zip(gathered, counts)])
    start = sum(counts[: dist.get_rank(group)])
    return rule(everywhere)[start : start + dots.shape[0]]
