"""Forward-mode differentiation as reverse mode would have it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_leaves

from metakern.layers.forms import TWICE_DIFFERENTIABLE, Forms
from metakern.layers.packing_parts import packed, padded

_ONE_AT_A_TIME = threading.RLock()
"""torch has one level of dual numbers in a process, whichever thread is at it."""


def _in_rows(group_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's forward mode of group normalisation takes rows of memory in order, and fails for channels_last."""
    return lambda input, *args, **kwargs: group_norm(input.contiguous(), *args, **kwargs)


def _in_one_precision(normalisation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's forward mode gives the tangent in the precision of the weights where the input has another (autocast)."""

    def normalised(*args: Any, **kwargs: Any) -> Tensor:
        output = normalisation(*args, **kwargs)
        primal, tangent = forward_ad.unpack_dual(output)
        if tangent is None or tangent.dtype == primal.dtype:
            return output
        return forward_ad.make_dual(primal, tangent.to(primal.dtype))

    return normalised


def _scatter_reduce(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """With the derivative that a backward pass takes: torch's forward mode has none of products, and shares extremes
    with no entry of `input` that is as large and left out.
    """
    if reduce == "prod" and (_is_dual(input) or _is_dual(src)):
        raise NotImplementedError("scatter_reduce(..., reduce='prod') has no forward mode")
    output = torch.scatter_reduce(input, dim, index, src, reduce, include_self=include_self)
    output, tangent = forward_ad.unpack_dual(output)
    if tangent is None:
        return output
    if reduce in ("amax", "amin") and not include_self:
        value = output.detach()
        largest = (src.detach() == value.gather(dim, index)).to(value.dtype)
        count = torch.zeros_like(value).scatter_add(dim, index, largest)
        tangent = torch.where((input.detach() == value) & (count > 0), tangent * count / (count + 1), tangent)
    return forward_ad.make_dual(output, tangent)


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    """At zero the slope of the left side, as in a backward pass; in torch's forward mode it is that of the right."""
    columns = (1, -1, *(1,) * (input.dim() - 2)) if weight.numel() > 1 and input.dim() > 1 else ()
    return torch.where(input > 0, input, weight.reshape(columns) * input)


def _larger(input: Tensor, other: Tensor) -> Tensor:
    """Of two equal ones the first, as in a backward pass of `torch.fmax`."""
    return torch.where((input >= other) | other.isnan(), input, other)


def _grouped_product(input: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tokens, group by group, times the matrix of their expert: linear in either; torch has no forward mode of it."""
    product = torch._grouped_mm  # type: ignore[attr-defined]
    (input, rows), (weights, matrices) = forward_ad.unpack_dual(input), forward_ad.unpack_dual(weights)
    output = product(input, weights, *args, **kwargs)
    parts = [] if rows is None else [product(_laid_out_as(input, rows), weights, *args, **kwargs)]
    parts += [] if matrices is None else [product(input, _laid_out_as(weights, matrices), *args, **kwargs)]
    return forward_ad.make_dual(output, sum(parts[1:], parts[0])) if parts else output


def _laid_out_as(primal: Tensor, tangent: Tensor) -> Tensor:
    """Grouped products take few layouts."""
    return tangent if tangent.stride() == primal.stride() else torch.empty_like(primal).copy_(tangent)


def _cumulated(input: Tensor, dim: int) -> Tensor:
    """logcumsumexp; torch's forward mode adds 1e-13 to sums of exp(x - max x), which may all be smaller than that."""
    input, tangent = forward_ad.unpack_dual(input)
    output = torch.logcumsumexp(input, dim)
    if tangent is None:
        return output
    signs = (tangent.clamp(min=0), (-tangent).clamp(min=0))
    up, down = ((torch.logcumsumexp(input + part.log(), dim) - output).exp() for part in signs)
    return forward_ad.make_dual(output, (up - down).masked_fill(output == -torch.inf, 0.0))


def _retained(tensor: Tensor) -> None:
    """Nothing to keep: the tensors of a dual pass require no gradient."""
    if tensor.requires_grad:
        tensor.retain_grad()


_FORMS = {
    **TWICE_DIFFERENTIABLE,
    F.group_norm: _in_rows(F.group_norm),
    torch.group_norm: _in_rows(torch.group_norm),
    **{f: _in_one_precision(f) for f in (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm)},
    **dict.fromkeys((torch.prelu, Tensor.prelu), _prelu),
    **dict.fromkeys((torch.fmax, Tensor.fmax), _larger),
    torch.scatter_reduce: _scatter_reduce,
    Tensor.scatter_reduce: _scatter_reduce,
    Tensor.scatter_reduce_: lambda input, *args, **kwargs: input.copy_(_scatter_reduce(input, *args, **kwargs)),
    Tensor.retain_grad: _retained,
    **dict.fromkeys((torch.logcumsumexp, Tensor.logcumsumexp), _cumulated),
    torch._grouped_mm: _grouped_product,  # type: ignore[attr-defined]
    torch._VF._pack_padded_sequence: packed,  # type: ignore[attr-defined]
    torch._VF._pad_packed_sequence: padded,  # type: ignore[attr-defined]
}


class _ForwardMode(Forms):
    """What runs under `torch.no_grad()` is a constant to a backward pass; torch's forward mode differentiates it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled():
            output = super().__torch_function__(func, types, args, kwargs)
            if isinstance(func, (OpOverload, OpOverloadPacket, HigherOrderOperator)):
                _require_tangent(func, args, kwargs or {}, output)
            return output
        with forward_ad._set_fwd_grad_enabled(False):
            return super().__torch_function__(func, types, args, kwargs)


def _require_tangent(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Operators whose derivatives are written in Python (`torch.library.custom_op`, `torch.cond`, scans) lose tangents
    without a word where no argument requires a gradient; torch's own say so where they have no forward mode.

    Raises: NotImplementedError: something dual went in, or may have by a closure, and nothing dual came out.
    """
    if str(operator).startswith(("aten.", "prims.")):  # of the latter torch's forward mode makes some derivatives
        return
    outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    closures = isinstance(operator, HigherOrderOperator)
    if outputs and not any(map(_is_dual, outputs)) and (closures or any(map(_is_dual, tree_leaves((args, kwargs))))):
        raise NotImplementedError(f"operator {operator} has no forward mode")


def _is_dual(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


@contextmanager
def dual_level() -> Iterator[None]:
    """`forward_ad.dual_level` with gradients enabled, so that a block without them inside is one; without the
    deprecation warnings that torch raises against itself on first use.
    """
    with _ONE_AT_A_TIME, torch.enable_grad(), forward_ad.dual_level():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            forward_ad.make_dual(torch.zeros(1, device="cpu"), torch.zeros(1, device="cpu"))
        with _ForwardMode(_FORMS):
            yield


def lacks_forward_mode(error: Exception) -> bool:
    """Is this how torch says that an operation has no forward-mode formula or a faulty one, or that a model takes
    gradients inside its forward pass, which a dual pass has none of?
    """
    words = ("forward ad", "forward mode", "forward gradient", "jvp", "efficientzerotensor", "does not require grad")
    words += ("_fw_primal",)  # of `requires_grad_` in a dual pass
    return any(word in str(error).lower() for word in words)
