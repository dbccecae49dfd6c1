"""weighted_grad: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import FLOATING, check_operands
from metakern.ops.waiting import host_may_wait

SCHEMA = (
    "weighted_grad(Tensor A, Tensor B, Tensor w, bool bias=False, Tensor? start=None, *, str? impl=None)"
    " -> (Tensor, Tensor)"
)


def check(A: Tensor, B: Tensor, w: Tensor, bias: bool = False, start: Tensor | None = None) -> None:
    if start is None:
        check_operands("weighted_grad", {"A": "nti", "B": "nto"}, (A, B))
    else:
        check_operands("weighted_grad", {"A": "nti", "B": "nto", "start": "oi"}, (A, B, start))
    if w.dim() != 1 or w.shape[0] != A.shape[0]:
        raise ValueError(f"weighted_grad: w must have shape [n] with n = {A.shape[0]}; got {list(w.shape)}")
    if w.dtype not in FLOATING:
        raise TypeError(f"weighted_grad: w must be a floating-point tensor; got {w.dtype}")
    if w.device != A.device:
        raise ValueError(f"weighted_grad: w must be on {A.device} like A; got {w.device}")


def fake(A: Tensor, B: Tensor, w: Tensor, bias: bool = False, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    o = B.shape[2]
    return A.new_empty(o, A.shape[2]), A.new_empty(o if bias else 0)


def flops(A: Tensor, B: Tensor, w: Tensor, bias: bool = False, start: Tensor | None = None) -> int:
    """Of the rows that are multiplied; all of them where the weights cannot be read (fake tensors, a capture)."""
    n, t, i = A.shape
    unread = w.is_meta or type(w) is not Tensor or not host_may_wait()
    kept = n if unread else int(w.count_nonzero())
    return 2 * kept * t * (i + bias) * B.shape[2]


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    w = torch.tensor([0.0, 1.0], device=device)
    return torch.ones(2, 3, 4, device=device), torch.ones(2, 3, 5, device=device), w
