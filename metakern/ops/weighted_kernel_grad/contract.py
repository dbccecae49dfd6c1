"""weighted_kernel_grad: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.convolution import Numbers, check_convolution
from metakern.ops.operands import FLOATING
from metakern.ops.waiting import host_may_wait

NAME = "weighted_kernel_grad"
SCHEMA = (
    f"{NAME}(Tensor A, Tensor B, Tensor w, Tensor kernel, int[] stride, int[] padding, int[] dilation, int groups=1, "
    "bool bias=False, Tensor? kept=None, *, str? impl=None) -> (Tensor, Tensor)"
)


def check(
    A: Tensor, B: Tensor, w: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers,
    groups: int = 1, bias: bool = False, kept: Tensor | None = None,
) -> None:  # fmt: skip
    check_convolution(NAME, A, B, kernel, stride, padding, dilation, groups)
    if w.dtype not in FLOATING:
        raise TypeError(f"{NAME}: w must be a floating-point tensor; got {w.dtype}")
    if w.device != A.device:
        raise ValueError(f"{NAME}: w must be on {A.device} like A; got {w.device}")
    if w.shape != A.shape[:1]:
        raise ValueError(f"{NAME}: w must have shape [n] with n = {A.shape[0]}; got {list(w.shape)}")
    if kept is not None and (kept.dtype is not torch.int64 or kept.dim() != 1 or kept.device != A.device):
        raise ValueError(
            f"{NAME}: kept must be int64 [k] on {A.device}; got {kept.dtype} {list(kept.shape)} on {kept.device}"
        )


def fake(
    A: Tensor, B: Tensor, w: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers,
    groups: int = 1, bias: bool = False, kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(kernel, dtype=A.dtype), A.new_empty(kernel.shape[0] if bias else 0)


def flops(
    A: Tensor, B: Tensor, w: Tensor, kernel: Tensor, stride: Numbers, padding: Numbers, dilation: Numbers,
    groups: int = 1, bias: bool = False, kept: Tensor | None = None,
) -> int:  # fmt: skip
    """Of the examples that are multiplied; all of them where the weights cannot be read (fake tensors, a capture)."""
    unread = w.is_meta or type(w) is not Tensor or not host_may_wait()
    multiplied = A.shape[0] if unread else int(w.count_nonzero())
    return 2 * multiplied * B.shape[2:].numel() * kernel.numel()


def example(device: torch.device) -> tuple[Tensor | list[int], ...]:
    """Small arguments, for the report and the tests."""
    w = torch.tensor([0.0, 1.0], device=device)
    A, B, kernel = (torch.ones(size, device=device) for size in ((2, 3, 6), (2, 4, 6), (4, 3, 3)))
    return A, B, w, kernel, [1], [1], [1]
