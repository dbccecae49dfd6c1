"""Calls that may put examples into another order depending on data: sorting, routing, masks over the batch.

Any function that takes activations together with integers, booleans or a sparse matrix may select rows by them, unless
it is known that it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.outputs import tensors_in

# name -> position of `dim`; along any other dimension than the first, examples stay where they are
_ALONG = {
    "index_select": 1, "gather": 1, "scatter": 1, "scatter_": 1, "scatter_add": 1, "scatter_add_": 1,
    "scatter_reduce": 1, "index_add": 1, "index_add_": 1, "index_copy": 1, "index_copy_": 1, "take_along_dim": 2,
    "sort": 1, "topk": 2, "kthvalue": 2, "mode": 1,
}  # fmt: skip
_OVER = {"roll": (2, "dims"), "flip": (1, "dims")}
_ANYWHERE = frozenset("masked_select masked_scatter masked_scatter_ take put put_ index_put index_put_ msort".split())
_BY_PLACE = frozenset(("grid_sample", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"))  # along all dims after two
_BY_INDEX = frozenset(("__getitem__", "__setitem__"))

# These combine each entry with its own number or mask. What `where` leaves out of a batch, `poison.py` reveals.
ENTRY_BY_ENTRY = frozenset(
    "add add_ sub sub_ mul mul_ div div_ true_divide pow lerp maximum minimum fmax fmin clamp where masked_fill "
    "masked_fill_ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ "
    "__rtruediv__ __itruediv__ __pow__ to type_as eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__".split()
)
# Losses combine each row with its own label; attention lets NaN through its mask.
_LOSSES = frozenset(
    "cross_entropy cross_entropy_rows nll_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss "
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss "
    "ctc_loss poisson_nll_loss hinge_embedding_loss margin_ranking_loss cosine_embedding_loss kl_div gaussian_nll_loss "
    "scaled_dot_product_attention multi_head_attention_forward".split()
)
KEEPS_ROWS = ENTRY_BY_ENTRY | _LOSSES
"""Names of functions whose integers, booleans and sparse matrices select no rows."""

REORDERING = _ANYWHERE | _BY_INDEX | _BY_PLACE | _OVER.keys() | _ALONG.keys()
"""Names of the functions that `picked_dims` must examine."""


def picked_dims(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], from_data: bool, is_static: Callable[[Tensor], bool]
) -> Sequence[int] | None:
    """Dimensions other than the first along which this call selects by data; None if it may select along the first.

    `from_data`: whether it selects from an activation; `is_static` recognises index tensors that are the same in every
    pass. Indices that are Python numbers are recorded with the other numbers of a call.
    """
    rank = args[0].dim() if args and isinstance(args[0], Tensor) else 0
    if name in _ANYWHERE or rank == 0:
        return None
    if name in _BY_INDEX:
        first, rest = _index_tensors(args[1])
        if not all(map(is_static, first)):
            return None
        return () if all(map(is_static, rest)) else range(1, rank)
    if name in _BY_PLACE:
        return range(2, rank) if from_data else ()
    if name in _OVER:
        position, keyword = _OVER[name]
        dims = args[position] if len(args) > position else kwargs.get(keyword, 0)
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        return None if any(dim % rank == 0 for dim in dims) else ()
    default = None if name == "take_along_dim" else -1
    dim = args[_ALONG[name]] if len(args) > _ALONG[name] else kwargs.get("dim", default)
    return (dim % rank,) if isinstance(dim, int) and dim % rank != 0 else None


def picks_rows(tensors: Sequence[Tensor], is_static: Callable[[Tensor], bool]) -> bool:
    """Whether activations meet integers, booleans or sparse tensors that are not the same in every pass."""
    return any([is_index(t) and not is_static(t) for t in tensors])


def is_index(tensor: Tensor) -> bool:
    """Whether it holds integers or booleans, or is sparse, rather than plain floating-point numbers."""
    return tensor.layout != torch.strided or not (tensor.is_floating_point() or tensor.is_complex())


def picks_unseen(tensors: Sequence[Tensor], constants: Sequence[Tensor], is_static: Callable[[Tensor], bool]) -> bool:
    """The same for functions that are not torch's: they may select by any tensor but activations and weights."""
    others = [t for t in tensors if not (t.requires_grad or isinstance(t, nn.Parameter) or is_static(t))]
    return any(is_index(t) or not any(t is constant for constant in constants) for t in others)


def _index_tensors(index: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that may index the first dimension (a mask may cover it too), and those that index any other."""
    parts = index if isinstance(index, tuple) else (index,)
    found = [tensors_in(part) for part in parts]
    leading = 1 if parts and parts[0] is not None and parts[0] is not Ellipsis else len(found)
    return [t for part in found[:leading] for t in part], [t for part in found[leading:] for t in part]
