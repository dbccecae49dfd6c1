"""weighted_grad: the public function and its table of implementations."""

from __future__ import annotations

from torch import Tensor

from metakern.ops import triton_backend
from metakern.ops.select import Implementation, Operator, always
from metakern.ops.weighted_grad import contract, native, reference

OPERATOR = Operator(
    contract,
    table=(
        triton_backend.implementation("weighted_grad"),
        Implementation("native", native.weighted_grad, always),
        Implementation("reference", reference.weighted_grad, always),
    ),
)


def weighted_grad(
    A: Tensor, B: Tensor, w: Tensor, *, bias: bool = False, start: Tensor | None = None, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of per-example gradients of a layer y = W x + b; rows of weight zero are never multiplied.

    `G = start + sum_n,t w_n B_nt A_nt^T` and `g = sum_n,t w_n B_nt`.

    Args:
        A: inputs of the layer, [n, t, i], any strides.
        B: gradients of the summed losses with respect to the layer's outputs, [n, t, o].
        w: weights [n], any floating dtype, any sign.
        bias: whether to compute g; if not, g has shape [0].
        start: what the sum is added to, [o, i] in A's dtype, any strides; not modified. None for zero.
        impl: None uses the first implementation that supports the case; a name never falls back.
    Returns: G [o, i] and g [o] in A's dtype, accumulated in float32, or float64 for float64 operands.
    Raises: ValueError for shapes, devices, an unknown `impl` or operands that require grad; TypeError for dtypes;
        RuntimeError if the requested implementation does not support the case.
    """
    return OPERATOR(A, B, w, bias, start, impl=impl)
