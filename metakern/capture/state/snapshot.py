"""The values of a tensor at one moment. Large tensors are copied on write: most of them (masks, tables, features of a
graph) are never written, and a step keeps several snapshots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._autograd import _unsafe_set_version_counter

from metakern.capture.host import is_traced

LARGE = 1 << 12
"""From this many entries on, a copy takes noticeable time."""


class Snapshot:
    """The values of a tensor, and the version at which a graph may have saved it. Never write into `value`."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, shared = tensor, _on_write(tensor)
        self._version = None if is_traced() else tensor._version
        self._memory, self._place = None, 0
        if shared is None:
            self.value, self._memory = tensor.detach().clone(), tensor.data  # other tensors may share it
        else:
            self.value, self._place = shared, tensor.untyped_storage()._cdata

    def restore(self) -> None:
        """Restore values and version, even if the version is the same: batch_norm and `.data` writes don't raise it."""
        if self._memory is not None:
            if _moved(self.tensor, self._memory):  # `tensor.data = other`
                self.tensor.data = self._memory
            self._memory.copy_(self.value)
        elif self.tensor.untyped_storage()._cdata != self._place:
            self.tensor.data = self.copy()
        elif address(self.tensor) != address(self.value):
            self.tensor.data.copy_(self.value)
        if self._version is not None and self.tensor._version != self._version:
            # A graph that saved these values expects this version.
            _unsafe_set_version_counter((self.tensor,), (self._version,))

    def changed(self) -> bool:
        """Whether the tensor has other values now."""
        if not _has_memory(self.tensor):
            return self._version is None or self.tensor._version != self._version
        if self._memory is None:
            if self.tensor.untyped_storage()._cdata != self._place:
                return True
            return address(self.tensor) != address(self.value) and not torch.equal(self.tensor, self.value)
        return _moved(self.tensor, self._memory) or not torch.equal(self._memory, self.value)

    def copy(self) -> Tensor:
        """A new tensor with these values."""
        shared = _on_write(self.value)
        return self.value.clone() if shared is None else shared


def _on_write(tensor: Tensor) -> Tensor | None:
    """A copy-on-write copy of a large tensor; None if it is small or torch cannot share its memory."""
    if tensor.numel() < LARGE or not _may_share(tensor):
        return None
    try:
        return tensor.detach()._lazy_clone()
    except RuntimeError:  # memory that torch has not allocated itself
        return None


def _moved(tensor: Tensor, memory: Tensor) -> bool:
    return _has_memory(tensor) and not is_traced() and address(tensor) != address(memory)


def address(tensor: Tensor) -> int:
    """The address of its first entry; `data_ptr` would count as a write and trigger the copy."""
    return torch._C._data_address(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def _may_share(tensor: Tensor) -> bool:
    """Whether its memory is on the CPU and held by this tensor alone. A NumPy array that shares it would write into
    both copies, and once torch has copied, the array would no longer share memory with the tensor.
    """
    if not _has_memory(tensor) or tensor.device.type != "cpu" or is_traced():
        return False
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == 2  # the tensor's own, and this object's


def _has_memory(tensor: Tensor) -> bool:
    """Whether it has memory of its own: not sparse, not a subclass made of other tensors."""
    return type(tensor) is Tensor and tensor.layout is torch.strided
