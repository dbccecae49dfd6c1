"""Calls that may put examples into another order depending on data: sorting, routing, masks over the batch.

Whatever takes activations together with whole numbers, truth values or a sparse matrix may pick rows by them, unless it
is known that it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# name -> position of `dim`; along any other dimension than the first, examples stay where they are
_ALONG = {
    "index_select": 1, "gather": 1, "scatter": 1, "scatter_": 1, "scatter_add": 1, "scatter_add_": 1,
    "scatter_reduce": 1, "index_add": 1, "index_add_": 1, "index_copy": 1, "index_copy_": 1, "take_along_dim": 2,
    "sort": 1, "topk": 2, "kthvalue": 2,
}  # fmt: skip
_OVER = {"roll": (2, "dims"), "flip": (1, "dims")}
_ANYWHERE = frozenset("masked_select masked_scatter masked_scatter_ take put put_ index_put index_put_".split())
_BY_INDEX = frozenset(("__getitem__", "__setitem__"))

# These take each entry with its own number or mask. What `where` leaves out of a batch, `capture.poison` lets show.
_ENTRY_BY_ENTRY = frozenset(
    "add add_ sub sub_ mul mul_ div div_ true_divide pow lerp maximum minimum fmax fmin clamp where masked_fill "
    "masked_fill_ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ "
    "__rtruediv__ __itruediv__ __pow__ to type_as eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__".split()
)
# Losses take each row with its own label; attention lets NaN through its mask.
_LOSSES = frozenset(
    "cross_entropy nll_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss mse_loss l1_loss "
    "smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss ctc_loss "
    "poisson_nll_loss hinge_embedding_loss margin_ranking_loss cosine_embedding_loss kl_div gaussian_nll_loss "
    "scaled_dot_product_attention multi_head_attention_forward".split()
)
KEEPS_ROWS = _ENTRY_BY_ENTRY | _LOSSES
"""Names of functions whose whole numbers, truth values and sparse matrices pick no rows."""

REORDERING = _ANYWHERE | _BY_INDEX | _OVER.keys() | _ALONG.keys()
"""Names of the functions that `may_reorder` has to look at."""


def may_reorder(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], is_static: Callable[[Tensor], bool]) -> bool:
    """Can this call move activations between rows in a way that differs from batch to batch?

    `is_static` tells index tensors that are the same in every pass.
    """
    if name in _ANYWHERE:
        return _is_activation(args)
    if name in _BY_INDEX:
        return _is_activation(args) and not all(is_static(t) for t in _leading_indices(args[1]))
    if name in _OVER:
        position, keyword = _OVER[name]
        dims = args[position] if len(args) > position else kwargs.get(keyword, 0)
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        return _is_activation(args) and any(dim % args[0].dim() == 0 for dim in dims)
    if name in _ALONG:
        dim = args[_ALONG[name]] if len(args) > _ALONG[name] else kwargs.get("dim", -1)
        return _is_activation(args) and not (isinstance(dim, int) and dim % args[0].dim() != 0)
    return False


def picks_rows(tensors: list[Tensor], is_static: Callable[[Tensor], bool]) -> bool:
    """Do activations come together with something that is no number to calculate with, and not the same every time?"""
    return any(t.requires_grad for t in tensors) and any(_picks(t) and not is_static(t) for t in tensors)


def _picks(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or not (tensor.is_floating_point() or tensor.is_complex())


def _is_activation(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].requires_grad


def _leading_indices(index: Any) -> list[Tensor]:
    """Tensors that index the first dimension (a mask may cover it too)."""
    first = index[0] if isinstance(index, tuple) and index else index
    return [first] if isinstance(first, Tensor) else []
