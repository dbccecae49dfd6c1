"""Split a batch into parts of a few examples, without knowing what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from metakern.capture.layout import is_sparse


def cut(batch: Any, size: int, argument: str) -> list[Any]:
    """The batch in parts of `size` examples, the last one possibly smaller: tensors are split along dimension 0.

    Tensors without a dimension, and anything else, go to every part. `argument` is what errors call the batch.

    Raises: as `examples_of`.
    """
    leaves, form = _leaves(batch)
    return [
        tree_unflatten(
            [_rows(leaf, start, size) if isinstance(leaf, Tensor) and leaf.dim() else leaf for leaf in leaves], form
        )
        for start in range(0, max(examples_of(batch, argument), 1), size)
    ]


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
