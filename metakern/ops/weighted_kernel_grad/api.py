"""weighted_kernel_grad: the public function and its table of implementations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metakern.ops.convolution import per_dimension
from metakern.ops.select import Implementation, Operator, always
from metakern.ops.weighted_kernel_grad import contract, native, reference

OPERATOR = Operator(
    contract,
    table=(
        Implementation("native", native.weighted_kernel_grad, always),
        Implementation("reference", reference.weighted_kernel_grad, always),
    ),
)


def weighted_kernel_grad(
    A: Tensor,
    B: Tensor,
    w: Tensor,
    kernel: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    bias: bool = False,
    kept: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of per-example gradients of kernel and bias of a convolution.

    `G = sum_n w_n d<B_n, conv(A_n; K)>/dK` and `g = sum_nt w_n B_nt`, t over the positions of the output. Examples of
    weight zero are not multiplied, except in a CUDA graph, where the host cannot wait to find them.

    Args:
        A: inputs of the convolution, [n, i, *space], with one to three spatial dimensions.
        B: gradients of the summed losses with respect to its outputs, [n, o, *space'].
        w: weights [n], any floating dtype, any sign.
        kernel: K [o, i / groups, *window]; only its shape and memory order are used.
        stride, padding, dilation, groups: of the convolution; one number, or one per spatial dimension.
        bias: whether to compute g; if not, g has shape [0].
        kept: indices [k] int64 of the weights that are not zero, if the caller knows them: otherwise the host waits for
            them, which stalls a GPU.
        impl: None uses the first implementation that supports the case; a name never falls back.
    Returns: G, with the shape and memory order of K, and g [o], in A's dtype.
    Raises: ValueError for shapes, devices, numbers of settings, an unknown `impl` or operands that require grad;
        TypeError for dtypes.
    """
    each = (per_dimension(value, kernel.dim() - 2) for value in (stride, padding, dilation))
    return OPERATOR(A, B, w, kernel, *each, groups, bias, kept, impl=impl)
