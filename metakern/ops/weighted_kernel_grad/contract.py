"""weighted_kernel_grad: schema, checks, shapes and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metakern.ops.operands import FLOATING

NAME = "weighted_kernel_grad"
SCHEMA = (
    f"{NAME}(Tensor A, Tensor B, Tensor w, Tensor kernel, int[] stride, int[] padding, int[] dilation, int groups=1, "
    "bool bias=False, *, str? impl=None) -> (Tensor, Tensor)"
)
Numbers = Sequence[int]


def check(
    A: Tensor, B: Tensor, w: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers,
    groups: int = 1, bias: bool = False,
) -> None:  # fmt: skip
    _check_tensors(A, B, w, kernel)
    spatial = kernel.dim() - 2
    for name, numbers in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if len(numbers) != spatial:
            raise ValueError(f"{NAME}: {name} must have {spatial} numbers, one per dimension of space; got {numbers}")
    if A.dim() != kernel.dim() or groups < 1 or A.shape[1] != groups * kernel.shape[1]:
        channels = f"{groups} x {kernel.shape[1]}"
        raise ValueError(
            f"{NAME}: A must have shape [n, {channels}, *space] with {spatial} dimensions of space; got {list(A.shape)}"
        )
    if w.shape != A.shape[:1]:
        raise ValueError(f"{NAME}: w must have shape [n] with n = {A.shape[0]}; got {list(w.shape)}")
    sizes = zip(A.shape[2:], kernel.shape[2:], stride, padding, dilation, strict=True)
    expected = [A.shape[0], kernel.shape[0], *((a + 2 * p - d * (k - 1) - 1) // s + 1 for a, k, s, p, d in sizes)]
    if list(B.shape) != expected:
        raise ValueError(f"{NAME}: B must have shape {expected}, that of the convolution's output; got {list(B.shape)}")


def _check_tensors(A: Tensor, B: Tensor, w: Tensor, kernel: Tensor) -> None:
    if A.dtype not in FLOATING:
        raise TypeError(f"{NAME}: A must be a floating-point tensor; got {A.dtype}")
    if B.dtype != A.dtype:
        raise TypeError(f"{NAME}: B must be {A.dtype} like A; got {B.dtype}")
    for name, tensor in (("w", w), ("kernel", kernel)):
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{NAME}: {name} must be a floating-point tensor; got {tensor.dtype}")
    for name, tensor in (("B", B), ("w", w), ("kernel", kernel)):
        if tensor.device != A.device:
            raise ValueError(f"{NAME}: {name} must be on {A.device} like A; got {tensor.device}")
    if kernel.dim() not in (3, 4, 5):
        raise ValueError(f"{NAME}: kernel must have shape [o, i / groups, *window]; got {list(kernel.shape)}")


def fake(
    A: Tensor, B: Tensor, w: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers,
    groups: int = 1, bias: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(kernel, dtype=A.dtype), A.new_empty(kernel.shape[0] if bias else 0)


def flops(
    A: Tensor, B: Tensor, w: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers,
    groups: int = 1, bias: bool = False,
) -> int:  # fmt: skip
    """Of the examples that are multiplied; all of them where the weights cannot be read (fake tensors) or are not."""
    n = A.shape[0]
    kept = n if w.is_meta or w.is_cuda or type(w) is not Tensor else int(w.count_nonzero())
    return 2 * kept * B.shape[2:].numel() * kernel.numel()


def example(device: torch.device) -> tuple[Tensor | list[int], ...]:
    """Small arguments, for the report and the tests."""
    w = torch.tensor([0.0, 1.0], device=device)
    A, B, kernel = (torch.ones(size, device=device) for size in ((2, 3, 6), (2, 4, 6), (4, 3, 3)))
    return A, B, w, kernel, [1], [1], [1]
