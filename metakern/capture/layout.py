"""Sparse tensors in every layout; torch's own `is_sparse` is true for only one of them."""

from __future__ import annotations

import torch
from torch import Tensor

_SPARSE = frozenset((torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc))
_BY_ROW = frozenset((torch.sparse_csr, torch.sparse_bsr))


def is_sparse(tensor: Tensor) -> bool:
    return tensor.layout in _SPARSE


def stored(tensor: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors that hold it: itself, or its indices and values."""
    if not is_sparse(tensor):
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in _BY_ROW:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def stored_alike(left: Tensor, right: Tensor) -> bool:
    """`torch.equal`, which does not take sparse tensors, applied to what is stored."""
    if left.layout != right.layout or left.shape != right.shape:
        return False
    return all(map(torch.equal, stored(left), stored(right)))
