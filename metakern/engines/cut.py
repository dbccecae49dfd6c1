"""Split a batch into parts of a few examples, or take some of them, without knowing what it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from metakern.capture.layout import is_sparse


def cut(batch: Any, size: int, argument: str) -> list[Any]:
    """The batch in parts of `size` examples, the last one possibly smaller: tensors are split along dimension 0.

    Tensors without a dimension, and anything else, go to every part. `argument` is what errors call the batch.

    Raises: as `examples_of`.
    """
    starts = range(0, max(examples_of(batch, argument), 1), size)
    return [_mapped(batch, lambda tensor, start=start: _rows(tensor, start, size)) for start in starts]


def spread(batch: Any, count: int, argument: str) -> Any:
    """`count` examples from all over the batch, or all of them if there are fewer; otherwise as `cut`."""
    step = max(examples_of(batch, argument) // count, 1)
    return _mapped(batch, lambda tensor: _every(tensor, step, count))


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    leaves, form = _leaves(batch)
    return tree_unflatten([change(x) if isinstance(x, Tensor) and x.dim() else x for x in leaves], form)


def examples_of(batch: Any, argument: str) -> int:
    """How many examples the batch has: the length of every tensor with a dimension.

    Raises:
        TypeError: the batch holds no tensor, so there is nothing to split.
        ValueError: its tensors do not agree on the number of examples.
    """
    shapes = [tuple(leaf.shape) for leaf in _leaves(batch)[0] if isinstance(leaf, Tensor) and leaf.dim()]
    if not shapes:
        raise TypeError(
            f"micro_batch splits tensors, in tuples, lists and mappings; {argument} is of type {type(batch).__name__} "
            "and holds none: pass its tensors, and rebuild it in loss_fn"
        )
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(
            f"micro_batch splits every tensor of {argument} along dimension 0, which must be the examples; they have "
            f"shapes {shapes}"
        )
    return sizes.pop()


def _leaves(batch: Any) -> tuple[list[Any], Any]:
    return tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)


def _rows(tensor: Tensor, start: int, size: int) -> Tensor:
    """Rows of a tensor; sparse ones have no views, and only the COO layout can be split."""
    if not is_sparse(tensor):
        return tensor[start : start + size]
    part = tensor.to_sparse_coo().narrow_copy(0, start, min(size, len(tensor) - start))
    return part.to_sparse(layout=tensor.layout)


def _every(tensor: Tensor, step: int, count: int) -> Tensor:
    """Every `step`-th row, `count` of them."""
    if not is_sparse(tensor):
        return tensor[::step][:count]
    rows = torch.arange(0, len(tensor), step, device=tensor.device)[:count]
    return tensor.to_sparse_coo().index_select(0, rows).to_sparse(layout=tensor.layout)
