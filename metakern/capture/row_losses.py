"""Cross entropy of rows of logits: by our own operators where these are faster, otherwise by torch's.

The operators keep two numbers per row, where torch keeps log-probabilities, and write nothing but the gradient. They
support only a backward pass; for other kinds of differentiation, torch's functions are used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import handle_torch_function, has_torch_function_variadic

from metakern import ops
from metakern.ops.select import OPERATORS

CLASSES, LOGITS = 512, 1 << 20
"""Fewest logits per row, and in total: below these, torch's cross entropy on the CPU is faster than our dispatch."""


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits [r, C] and class indices [r] -> [r], 0 where the index is -100.

    As `F.cross_entropy(logits, targets, reduction="none")`: the dtype is that of the logits, under autocast float32.
    """
    if _operators_are_faster(logits, targets):
        return cross_entropy_rows(logits, targets)
    return F.cross_entropy(logits, targets, reduction="none")


def _operators_are_faster(logits: Tensor, targets: Tensor) -> bool:
    return (
        logits.shape[1] >= CLASSES
        and logits.numel() >= LOGITS
        and type(logits) is Tensor
        and targets.dtype is torch.int64
        and targets.device == logits.device
        and OPERATORS["cross_entropy_rows"].choose(logits, targets).name == "native"
        and peek_interpreter_stack() is None  # torch.func
        and forward_ad.unpack_dual(logits).tangent is None
    )


def cross_entropy_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy by our operators; function modes see one call, as they do with `F.cross_entropy`."""
    if has_torch_function_variadic(logits, targets):
        return handle_torch_function(cross_entropy_rows, (logits, targets), logits, targets)
    return _CrossEntropyRows.apply(logits, targets)


class _CrossEntropyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, highs, sums = ops.cross_entropy_rows(logits, targets)
        ctx.save_for_backward(logits, targets, highs, sums)
        return losses if torch.is_autocast_enabled(logits.device.type) else losses.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, highs, sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            losses = F.cross_entropy(logits.to(highs.dtype), targets, reduction="none")
            return torch.autograd.grad(losses, logits, grad.to(losses.dtype), create_graph=True)[0], None
        return ops.cross_entropy_rows_backward(logits, targets, highs, sums, grad.to(highs.dtype)), None
