"""kernel_grads: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.convolution import Numbers, check_convolution

NAME = "kernel_grads"
SCHEMA = (
    f"{NAME}(Tensor A, Tensor B, Tensor kernel, int[] stride, int[] padding, int[] dilation, int groups=1, "
    "bool bias=False, *, str? impl=None) -> (Tensor, Tensor)"
)


def check(
    A: Tensor, B: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers, groups: int = 1,
    bias: bool = False,
) -> None:  # fmt: skip
    check_convolution(NAME, A, B, kernel, stride, padding, dilation, groups)


def fake(
    A: Tensor, B: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers, groups: int = 1,
    bias: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return A.new_empty(A.shape[0], *kernel.shape), A.new_empty(A.shape[0], kernel.shape[0] if bias else 0)


def flops(
    A: Tensor, B: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers, groups: int = 1,
    bias: bool = False,
) -> int:  # fmt: skip
    return 2 * A.shape[0] * B.shape[2:].numel() * kernel.numel()


def example(device: torch.device) -> tuple[Tensor | list[int], ...]:
    """Small arguments, for the report and the tests."""
    A, B, kernel = (torch.ones(size, device=device) for size in ((2, 3, 6), (2, 4, 6), (4, 3, 3)))
    return A, B, kernel, [1], [1], [1]
