"""Split a batch into parts of a few examples, or take some of them, without knowing what it means."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from metakern.capture.layout import is_sparse


def cut(batch: Any, size: int, argument: str) -> list[Any]:
    """The batch in parts of `size` examples, the last one possibly smaller: tensors are split along dimension 0, and so
    are arrays, lists and tuples of other things that have as many entries.

    Tensors without a dimension, and anything else, go to every part. `argument` is what errors call the batch.

    Raises: as `examples_of`.
    """
    n = max(examples_of(batch, argument), 1)
    return [_taken(batch, n, range(start, min(start + size, n))) for start in range(0, n, size)]


def spread(batch: Any, count: int, argument: str, phase: float = 0.5) -> Any:
    """One example from each of `count` equal stretches of the batch, or all of them if there are fewer; otherwise as
    `cut`. `phase`, from 0 to 1, says which one of a stretch.
    """
    n = examples_of(batch, argument)
    count = min(count, n)
    return _taken(batch, n, [int((k + phase) * n / count) for k in range(count)])


def examples_of(batch: Any, argument: str) -> int:
    """How many examples the batch has: the length of every tensor with a dimension.

    Raises:
        TypeError: the batch holds no tensor, or one inside an object, which cannot be split.
        ValueError: its tensors do not agree on the number of examples.
    """
    leaves = _leaves(batch)
    shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
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
    n = sizes.pop()
    for leaf in leaves:
        if _hides_rows(leaf, n):
            raise TypeError(
                f"micro_batch splits tensors, in tuples, lists and mappings; {argument} holds an object of type "
                f"{type(leaf).__name__} with a tensor of {n} rows inside: pass that tensor, and rebuild it in loss_fn"
            )
    return n


def _leaves(batch: Any) -> list[Any]:
    leaves = tree_leaves(batch)
    return [one for leaf in leaves for one in (_leaves(dict(leaf)) if isinstance(leaf, Mapping) else [leaf])]


def _hides_rows(leaf: Any, n: int) -> bool:
    if isinstance(leaf, (Tensor, nn.Module, type)) or not hasattr(leaf, "__dict__"):
        return False
    return any(isinstance(held, Tensor) and held.dim() and len(held) == n for held in vars(leaf).values())


def _taken(batch: Any, n: int, rows: Sequence[int]) -> Any:
    """These rows of a batch of `n` examples."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _rows(leaf, rows) if leaf.dim() else leaf
        if isinstance(leaf, Mapping):
            return _refilled(leaf, {key: _taken(value, n, rows) for key, value in leaf.items()})
        if _is_array(leaf, n):
            return leaf[list(rows)]
        return type(leaf)([leaf[row] for row in rows]) if _is_plain_list(leaf, n) else leaf

    return tree_map(of, batch, is_leaf=lambda inner: _is_plain_list(inner, n))


def _is_plain_list(value: Any, n: int) -> bool:
    """Whether it may hold one entry for each example: names, costs; tensors in it are split one by one."""
    return type(value) in (list, tuple) and len(value) == n and not any(isinstance(x, Tensor) for x in _leaves(value))


def _is_array(value: Any, n: int) -> bool:
    return type(value).__module__ == "numpy" and getattr(value, "ndim", 0) > 0 and len(value) == n


def _refilled(mapping: Mapping[Any, Any], entries: dict[Any, Any]) -> Mapping[Any, Any]:
    """A tokenizer's output keeps its class, whose attributes are its entries; other mappings become dicts."""
    if not isinstance(mapping, UserDict):
        return entries
    found = copy.copy(mapping)
    found.update(entries)
    return found


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor, as a view if they follow one another; sparse ones are copied, in the layout that they have."""
    if is_sparse(tensor):
        found = tensor.to_sparse_coo()
        if isinstance(rows, range):
            return found.narrow_copy(0, rows.start, len(rows)).to_sparse(layout=tensor.layout)
        return found.index_select(0, torch.tensor(rows, device=tensor.device)).to_sparse(layout=tensor.layout)
    return tensor[rows.start : rows.stop] if isinstance(rows, range) else tensor[rows]
