"""The three reductions that a re-weighted step needs over a process group, and what becomes of a rank that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class OtherRankFailed(RuntimeError):
    """Another rank has raised, or goes another way, so that this one cannot go on either."""


@contextmanager
def failing_together(group: Any) -> Iterator[None]:
    """If a rank raises inside the block, all others raise `OtherRankFailed` where they would have waited for it, so
    that the reductions of the next step meet one another again. No rank leaves the block before all are done.
    """
    if group is None:
        yield
        return
    try:
        yield
    except OtherRankFailed:
        raise
    except Exception:
        _announced(None, group)
        raise
    _counts(0, group, "end")


def mean_over_group(v: dict[str, Tensor], parameters: Mapping[str, Tensor], m: int, group: Any) -> dict[str, Tensor]:
    """V over the meta examples of all ranks, from its mean over the `m` of this one.

    The parameters must be the same on every rank. Each is reduced, in the same order everywhere, also where this rank
    has no gradient for it (an expert without tokens): the reductions of a group are paired by their order alone.
    """
    if group is None:
        return v
    share = m / sum(_counts(m, group, "meta gradient"))
    return {
        name: _summed(v[name] * share if name in v else torch.zeros_like(p), group) for name, p in parameters.items()
    }


def sum_over_group(gradient: dict[str, Tensor], group: Any) -> None:
    """Sum weighted gradients over the group; sparse ones, whose rows differ between ranks, become dense."""
    if group is not None:
        for name, tensor in gradient.items():
            gradient[name] = _summed(tensor.to_dense(), group)


def weights_over_group(rule: Callable[[Tensor], Tensor], dots: Tensor, group: Any) -> Tensor:
    """Apply a weight rule to the dots of all ranks at once and return this rank's part."""
    if group is None:
        return rule(dots)
    counts = _counts(dots.shape[0], group, "weights")
    padded = torch.cat([dots, dots.new_zeros(max(counts) - dots.shape[0])])  # gather wants equal sizes
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    everywhere = torch.cat([part[:count] for part, count in zip(gathered, counts)])
    start = sum(counts[: dist.get_rank(group)])
    return rule(everywhere)[start : start + dots.shape[0]]


def _counts(own: int, group: Any, place: str) -> list[int]:
    """A count of every rank, all of which must be at the same place of the step.

    Raises: OtherRankFailed
    """
    said = _announced((place, own), group)
    for rank, one in enumerate(said):
        if one is None:
            raise OtherRankFailed(f"process_group: rank {rank} failed in this step (its own error says why)")
    if len({there for there, _ in said}) > 1:
        raise OtherRankFailed(
            "process_group: an engine was rejected on some of the ranks only, after the meta gradient was reduced; "
            "pass the engine that supports the batches of all ranks"
        )
    return [count for _, count in said]


def _announced(own: tuple[str, int] | None, group: Any) -> list[Any]:
    """What every rank says: its place and count, or None if it has failed."""
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, own, group=group)
    return said


def _summed(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the group, in memory of its own and in the same layout on every rank: gradients of two parameters
    may be one tensor, or one number, expanded, and all-reduce adds up memory, whatever its strides.
    """
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total
