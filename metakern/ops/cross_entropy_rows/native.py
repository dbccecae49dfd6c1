"""cross_entropy_rows in one reading of the logits: C++ on the CPU, CUDA on the GPU; sums in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops import extension
from metakern.ops.operands import accumulator

_CPU_KERNELS = {torch.float32: "cross_entropy_rows_f32", torch.bfloat16: "cross_entropy_rows_bf16"}


def supports(logits: Tensor, *_: object) -> str | None:
    """Also of the backward, whatever its other arguments."""
    reason = extension.unsupported(logits)
    if reason is not None:
        return reason
    if not logits.is_cuda and logits.dtype not in _CPU_KERNELS:
        return f"the CPU kernel takes float32 and bfloat16; got {logits.dtype}"
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return "rows must be contiguous"
    return None


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    targets = targets.contiguous()
    losses, highs, sums = (torch.empty(rows, dtype=accumulator(logits.dtype), device=logits.device) for _ in range(3))
    operands = (logits.data_ptr(), targets.data_ptr(), losses.data_ptr(), highs.data_ptr(), sums.data_ptr())
    sizes = (rows, classes, logits.stride(0), ignore_index, label_smoothing)
    if logits.is_cuda:
        extension.cuda.cross_entropy_rows(extension.SCALARS[logits.dtype], *operands, *sizes, extension.stream(logits))
    else:
        wrong = getattr(extension.cpu, _CPU_KERNELS[logits.dtype])(*operands, *sizes)
        require_classes(wrong, targets, classes, ignore_index)
    return losses, highs, sums


def require_classes(wrong: int, targets: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError as torch does, if `wrong` is a row and not -1."""
    if wrong >= 0:
        raise IndexError(
            f"Target {int(targets[wrong])} is out of bounds: targets must be in [0, {classes}) or ignore_index = "
            f"{ignore_index}"
        )
