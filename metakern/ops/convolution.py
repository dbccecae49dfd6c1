"""What the operators on convolutions share: checks of operands and settings, and the library's kernel gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metakern.ops.operands import FLOATING

Numbers = Sequence[int]


def per_dimension(value: int | Sequence[int], spatial: int) -> list[int]:
    """One number per dimension of space; a list of one stands for all of them, as in torch's convolutions."""
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values


def check_convolution(
    operator: str, A: Tensor, B: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers,
    groups: int,
) -> None:  # fmt: skip
    """Check inputs A, output gradients B and the kernel of a convolution against its settings.

    Raises: TypeError for dtypes, ValueError for devices, shapes and numbers of settings, naming the argument.
    """
    _check_tensors(operator, A, B, kernel)
    spatial = kernel.dim() - 2
    for name, numbers in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if len(numbers) != spatial:
            raise ValueError(
                f"{operator}: {name} must have {spatial} numbers, one per dimension of space; got {numbers}"
            )
    if A.dim() != kernel.dim() or groups < 1 or A.shape[1] != groups * kernel.shape[1]:
        channels = f"{groups} x {kernel.shape[1]}"
        raise ValueError(
            f"{operator}: A must have shape [n, {channels}, *space] with {spatial} dimensions of space; "
            f"got {list(A.shape)}"
        )
    sizes = zip(A.shape[2:], kernel.shape[2:], stride, padding, dilation, strict=True)
    expected = [A.shape[0], kernel.shape[0], *((a + 2 * p - d * (k - 1) - 1) // s + 1 for a, k, s, p, d in sizes)]
    if list(B.shape) != expected:
        raise ValueError(
            f"{operator}: B must have shape {expected}, that of the convolution's output; got {list(B.shape)}"
        )


def _check_tensors(operator: str, A: Tensor, B: Tensor, kernel: Tensor) -> None:
    if A.dtype not in FLOATING:
        raise TypeError(f"{operator}: A must be a floating-point tensor; got {A.dtype}")
    if B.dtype != A.dtype:
        raise TypeError(f"{operator}: B must be {A.dtype} like A; got {B.dtype}")
    if kernel.dtype not in FLOATING:
        raise TypeError(f"{operator}: kernel must be a floating-point tensor; got {kernel.dtype}")
    for name, tensor in (("B", B), ("kernel", kernel)):
        if tensor.device != A.device:
            raise ValueError(f"{operator}: {name} must be on {A.device} like A; got {tensor.device}")
    if kernel.dim() not in (3, 4, 5):
        raise ValueError(f"{operator}: kernel must have shape [o, i / groups, *window]; got {list(kernel.shape)}")


def library_gradient(
    A: Tensor, B: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers, groups: int, bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of sum B * (conv(A; kernel) + bias) in kernel and bias; `kernel` gives a shape and a memory order."""
    outputs, no_output_padding = [kernel.shape[0]], [0] * len(stride)
    _, grad, shift = torch.ops.aten.convolution_backward(
        B, A, kernel, outputs, stride, padding, dilation, False, no_output_padding, groups, [False, True, bias]
    )
    return grad, shift if bias else grad.new_empty(0)
