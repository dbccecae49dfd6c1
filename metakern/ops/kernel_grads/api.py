"""kernel_grads: the public function and its table of implementations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metakern.ops.convolution import per_dimension
from metakern.ops.kernel_grads import contract, native, reference
from metakern.ops.select import Implementation, Operator, always

OPERATOR = Operator(
    contract,
    table=(
        Implementation("native", native.kernel_grads, always),
        Implementation("reference", reference.kernel_grads, always),
    ),
)


def kernel_grads(
    A: Tensor,
    B: Tensor,
    kernel: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    bias: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-example gradients of kernel and bias of a convolution.

    `G_n = d<B_n, conv(A_n; K)>/dK` and `g_n = sum_t B_nt`, t over the positions of the output.

    Args:
        A: inputs of the convolution, [n, i, *space], with one to three spatial dimensions.
        B: gradients of the summed losses with respect to its outputs, [n, o, *space'].
        kernel: K [o, i / groups, *window]; only its shape is used.
        stride, padding, dilation, groups: of the convolution; one number, or one per spatial dimension.
        bias: whether to compute g; if not, g has shape [n, 0].
        impl: None uses the first implementation that supports the case; a name never falls back.
    Returns: G [n, o, i / groups, *window] and g [n, o] in A's dtype, contiguous.
    Raises: ValueError for shapes, devices, numbers of settings, an unknown `impl` or operands that require grad;
        TypeError for dtypes.
    """
    each = (per_dimension(value, kernel.dim() - 2) for value in (stride, padding, dilation))
    return OPERATOR(A, B, kernel, *each, groups, bias, impl=impl)
