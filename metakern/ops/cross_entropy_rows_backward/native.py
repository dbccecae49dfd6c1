"""cross_entropy_rows_backward in one reading and one writing: C++ on the CPU, CUDA on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops import extension
from metakern.ops.cross_entropy_rows.native import require_classes

_CPU_KERNELS = {
    torch.float32: "cross_entropy_rows_backward_f32",
    torch.bfloat16: "cross_entropy_rows_backward_bf16",
}


def cross_entropy_rows_backward(
    logits: Tensor,
    targets: Tensor,
    highs: Tensor,
    sums: Tensor,
    grad: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    rows, classes = logits.shape
    targets, highs, sums, grad = targets.contiguous(), highs.contiguous(), sums.contiguous(), grad.contiguous()
    out = torch.empty(rows, classes, dtype=logits.dtype, device=logits.device)
    operands = (logits.data_ptr(), targets.data_ptr(), highs.data_ptr(), sums.data_ptr(), grad.data_ptr())
    sizes = (out.data_ptr(), rows, classes, logits.stride(0), ignore_index, label_smoothing)
    if logits.is_cuda:
        scalar, stream = extension.SCALARS[logits.dtype], extension.stream(logits)
        extension.cuda.cross_entropy_rows_backward(scalar, *operands, *sizes, stream)
    else:
        wrong = getattr(extension.cpu, _CPU_KERNELS[logits.dtype])(*operands, *sizes)
        require_classes(wrong, targets, classes, ignore_index)
    return out
