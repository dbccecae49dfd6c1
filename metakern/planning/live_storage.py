"""Memory that passes hold: storages allocated by operators, as long as anything refers to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Sizes = dict[int, int]
"""Bytes by storage: what is held twice counts once."""


class LiveStorage(TorchDispatchMode):
    """After each operator that allocates, notes how many bytes allocated inside the block are still held. Scratch
    memory inside a kernel is not seen, and memory from before the block does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held = [0]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        # The references are kept, since the key of a dead one may be reused for another storage.
        self._before: dict[int, StorageWeakRef] = {}
        self._sum: tuple[StorageWeakRef, int] | None = None  # a gradient that was added to, and the bytes held then

    @property
    def peak(self) -> int:
        """The most bytes held since the last `take_peak`."""
        return max(self.settled())

    def take_peak(self) -> int:
        """The same, and the next begins here."""
        peak, self._held = self.peak, [self._bytes()]
        return peak

    def settled(self) -> Sequence[int]:
        """The bytes held after each operator since then."""
        self._settle()
        return self._held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._settle()
        for tensor in _tensors((args, kwargs)):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in self._made:
                self._before.setdefault(reference.cdata, reference)
        output, made = func(*args, **(kwargs or {})), len(self._made)
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self._before:
                self._made.setdefault(reference.cdata, (reference, storage.nbytes()))
        if _may_add_in_place(func, args):
            self._sum = StorageWeakRef(args[0].untyped_storage()), self._bytes()
        elif len(self._made) > made:
            self._held.append(self._bytes())
        return output

    def _bytes(self) -> int:
        gone = torch.UntypedStorage._expired
        self._made = {key: entry for key, entry in self._made.items() if not gone(key)}
        return sum([size for _, size in self._made.values()])

    def _settle(self) -> None:
        """Do not count a sum whose first term is freed by the next operator: unwatched, autograd adds in place."""
        if self._sum is not None:
            first, held = self._sum
            self._held.append(0 if first.expired() else held)
            self._sum = None


def _may_add_in_place(func: Any, args: Any) -> bool:
    """Whether autograd sums, perhaps in place, the gradients of a tensor that was used more than once: in a backward
    pass, unless the first is a view, whose base stays. The formulas of second derivatives have sums of their own.
    """
    node = torch._C._current_autograd_node()
    by_autograd = node is not None and not torch.is_grad_enabled() and "BackwardBackward" not in node.name()
    return by_autograd and func is torch.ops.aten.add.Tensor and not args[0]._is_view()


def _tensors(tree: Any) -> Iterable[Tensor]:
    """Those that take memory: no meta tensors, and no zero tensors of forward mode."""
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [t for t in leaves if t.layout == torch.strided and not t.is_meta and not t._is_zerotensor()]


def sizes(tensors: Iterable[Any], before: Collection[int]) -> Sizes:
    """Bytes by storage, without those that were there before."""
    strided = [t for t in tensors if isinstance(t, Tensor) and t.layout == torch.strided]
    storages = [tensor.untyped_storage() for tensor in strided]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes() and s.data_ptr() not in before}
