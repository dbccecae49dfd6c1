"""Replacements for functions whose forward mode in torch does not agree with their backward pass.

It is missing, fails, or is another derivative: a factorisation accepts any tangent although its gradient is symmetric;
a padding row has a tangent but gets no gradient. For a scalar loss l(theta) both modes must give the same number,
<dl/dtheta, v>; tests/capture/test_torch_functions.py checks torch's functions for this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metakern.capture.host import is_traced
from metakern.layers.forward.custom_functions import through_backward
from metakern.layers.forward.dual import is_dual
from metakern.layers.forward.dual_product import PAIRED, dual_linear, dual_product, dual_sum
from metakern.layers.forward.forms import TWICE_DIFFERENTIABLE
from metakern.layers.forward.packing_parts import packed, padded
from metakern.layers.forward.recurrent_steps import RECURRENT_FORMS


def _in_rows(group_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's forward mode of group normalisation expects contiguous memory, and fails for channels_last."""
    return lambda input, *args, **kwargs: group_norm(input.contiguous(), *args, **kwargs)


def _in_one_precision(normalisation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's forward mode gives tangents in the precision of the weights, even if the input has another (autocast)."""

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
    """With the derivative of the backward pass: torch's forward mode has none for products, and does not split the
    gradient of an extreme with an equal entry of `input` that is left out.
    """
    if reduce == "prod" and (is_dual(input) or is_dual(src)):
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
    """At zero the left slope, as in the backward pass; torch's forward mode takes the right one."""
    columns = (1, -1, *(1,) * (input.dim() - 2)) if weight.numel() > 1 and input.dim() > 1 else ()
    return torch.where(input > 0, input, weight.reshape(columns) * input)


def _by_backward(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    duals = any(map(is_dual, tree_leaves((args, kwargs))))
    return through_backward(function, args, kwargs, function.__name__) if duals else function(*args, **kwargs)


def _grouped_product(input: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tokens, group by group, times the matrix of their expert: linear in both; torch has no forward mode for it."""
    product = torch._grouped_mm  # type: ignore[attr-defined]
    (input, rows), (weights, matrices) = forward_ad.unpack_dual(input), forward_ad.unpack_dual(weights)
    output = product(input, weights, *args, **kwargs)
    parts = [] if rows is None else [product(_laid_out_as(input, rows), weights, *args, **kwargs)]
    parts += [] if matrices is None else [product(input, _laid_out_as(weights, matrices), *args, **kwargs)]
    return forward_ad.make_dual(output, sum(parts[1:], parts[0])) if parts else output


def _laid_out_as(primal: Tensor, tangent: Tensor) -> Tensor:
    """Grouped products accept few memory layouts."""
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


def _looked_up(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a table; the padding row gets no gradient, but has a tangent if the table is used elsewhere."""
    weight, tangent = forward_ad.unpack_dual(weight)
    output = F.embedding(input, weight, padding_idx, max_norm, norm_type)
    if tangent is None:
        return output
    if scale_grad_by_freq:
        raise NotImplementedError("embedding(..., scale_grad_by_freq=True) has no forward mode")
    rows = F.embedding(input, tangent)
    if padding_idx is not None:
        rows = rows.masked_fill((input == padding_idx % weight.shape[0]).unsqueeze(-1), 0.0)
    return forward_ad.make_dual(output, rows)


def _rows_of(weight: Tensor, indices: Tensor, padding_idx: int = -1, *scaled: bool, **options: bool) -> Tensor:
    """torch.embedding, which takes its arguments in another order, and -1 for no padding."""
    by_count = scaled[0] if scaled else options.get("scale_grad_by_freq", False)
    return _looked_up(indices, weight, padding_idx if padding_idx >= 0 else None, scale_grad_by_freq=by_count)


def _symmetric(factorisation: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass assumes the matrix symmetric and gives it a symmetric gradient, whichever triangle is read."""

    def factorised(*args: Any, **kwargs: Any) -> Any:
        matrices = {key: _with_symmetric_tangent(value) for key, value in kwargs.items()}
        return factorisation(*map(_with_symmetric_tangent, args), **matrices)

    return factorised


def _with_symmetric_tangent(value: Any) -> Any:
    if not is_dual(value):
        return value
    matrix, tangent = forward_ad.unpack_dual(value)
    assert tangent is not None
    return forward_ad.make_dual(matrix, (tangent + tangent.mH) / 2)


def _unpooled(unpool: Callable[..., Tensor], dimensions: int) -> Callable[..., Tensor]:
    """If two entries go to one place, the last one is taken, but both get the gradient of that place."""

    def placed(input: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        input, tangent = forward_ad.unpack_dual(input)
        output = unpool(input, indices, *args, **kwargs)
        if tangent is None:
            return output
        empty = torch.zeros_like(output).flatten(-dimensions)
        placed = empty.scatter_add(-1, indices.flatten(-dimensions), tangent.flatten(-dimensions))
        return forward_ad.make_dual(output, placed.view_as(output))

    return placed


def _scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """While a program is traced, torch's forward mode multiplies missing tangents by `alpha`, `beta` or `value`, which
    crashes the process; so missing tangents are replaced by zeros.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        if is_traced() and not kwargs.keys().isdisjoint(("alpha", "beta", "value")):
            kept = 1 if function.__name__.endswith("_") else 0  # the target of an in-place call stays itself
            args = (*args[:kept], *map(_with_tangent, args[kept:]))
        return function(*args, **kwargs)

    return called


def _with_tangent(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or is_dual(value):
        return value
    return forward_ad.make_dual(value, torch.zeros_like(value))


def _without(name: str) -> Callable[..., Any]:
    """Rejects a function whose forward mode in torch disagrees with its backward pass."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} has no forward mode that agrees with its backward pass")

    return refused


FAKE_QUANTISED = (
    torch.fake_quantize_per_tensor_affine,
    torch.fake_quantize_per_channel_affine,
    torch.fused_moving_avg_obs_fake_quant,
)
"""Rounding in quantisation-aware training: gradients pass unchanged where values were not clipped."""

FORWARD_FORMS = {
    **TWICE_DIFFERENTIABLE,
    **RECURRENT_FORMS,
    F.group_norm: _in_rows(F.group_norm),
    torch.group_norm: _in_rows(torch.group_norm),
    **{f: _in_one_precision(f) for f in (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm)},
    **dict.fromkeys((torch.prelu, Tensor.prelu), _prelu),
    # Of two equal entries the first gets the gradient, or since torch 2.14 each one half; forward mode differs.
    **{f: partial(_by_backward, f) for f in (torch.fmax, Tensor.fmax)},
    **{f: partial(_by_backward, f) for f in FAKE_QUANTISED},
    torch.scatter_reduce: _scatter_reduce,
    Tensor.scatter_reduce: _scatter_reduce,
    Tensor.scatter_reduce_: lambda input, *args, **kwargs: input.copy_(_scatter_reduce(input, *args, **kwargs)),
    Tensor.retain_grad: _retained,
    **dict.fromkeys((torch.logcumsumexp, Tensor.logcumsumexp), _cumulated),
    torch._grouped_mm: _grouped_product,  # type: ignore[attr-defined]
    torch._VF._pack_padded_sequence: packed,  # type: ignore[attr-defined]
    torch._VF._pad_packed_sequence: padded,  # type: ignore[attr-defined]
    F.linear: dual_linear,
    **{f: dual_product(f) for f in PAIRED},
    F.embedding: _looked_up,
    torch.embedding: _rows_of,
    **{f: _symmetric(f) for f in (torch.linalg.eigh, torch.linalg.cholesky, torch.linalg.cholesky_ex)},
    F.max_unpool1d: _unpooled(F.max_unpool1d, 1),
    F.max_unpool2d: _unpooled(F.max_unpool2d, 2),
    F.max_unpool3d: _unpooled(F.max_unpool3d, 3),
    **{
        getattr(owner, name + end): _scaled(getattr(owner, name + end))
        for name in ("add", "sub", "subtract", "addmm", "addmv", "addr", "addbmm", "baddbmm", "addcmul", "addcdiv")
        for owner, end in ((torch, ""), (Tensor, ""), (Tensor, "_"))
    },
    torch.rsub: _scaled(torch.rsub),
    **{f: dual_sum(_scaled(f)) for f in (torch.addmm, Tensor.addmm, torch.sparse.addmm)},
    **{
        getattr(owner, name): _without(name)
        for name in ("as_strided_scatter", "cholesky_inverse", "triangular_solve")
        for owner in (torch, Tensor)
    },
}
