"""What a tensor holds at one moment. Large ones are copied on write: most of them, masks, tables, the features of a
graph, are never written, and a step keeps several moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.capture.host import is_traced

LARGE = 1 << 16
"""Entries of a tensor whose copy would be noticed."""


def snapshot(tensor: Tensor) -> Tensor:
    """What `tensor` holds, for `put_back`; never to be written into while `tensor` lives."""
    if tensor.numel() >= LARGE and _may_share(tensor):
        try:
            return tensor.detach()._lazy_clone()
        except RuntimeError:  # memory that torch has not allocated itself
            pass
    return tensor.detach().clone()


def put_back(tensor: Tensor, kept: Tensor) -> None:
    """Let `tensor` hold what it held when `kept` was made of it.

    Whatever its version says: batch_norm and writes through `.data` do not raise it. Nor does this, since a graph that
    saved the tensor holds these same values.
    """
    if tensor.numel() < LARGE or not _share(tensor, kept):
        tensor.data.copy_(kept)


def address(tensor: Tensor) -> int:
    """Where its first entry lies; `data_ptr` would count as a write, and copy."""
    return torch._C._data_address(tensor)


def _may_share(tensor: Tensor) -> bool:
    """Is its memory the CPU's, and nobody else's? Writes through an array of NumPy's would be seen by both, and after
    torch has copied for a writer that array would be another one's.
    """
    if not _has_memory(tensor) or tensor.device.type != "cpu" or is_traced():
        return False
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == 2  # the tensor's own, and this object's


def _share(tensor: Tensor, kept: Tensor) -> bool:
    return _has_memory(kept) and torch._C._is_cow_tensor(kept) and address(tensor) == address(kept)


def _has_memory(tensor: Tensor) -> bool:
    """Of its own: not sparse, not a subclass made of other tensors."""
    return type(tensor) is Tensor and tensor.layout is torch.strided
