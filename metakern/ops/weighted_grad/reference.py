"""weighted_grad in one expression of PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator


def weighted_grad(A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    dtype = accumulator(A.dtype)
    kept = w.nonzero().squeeze(1)  # a row of weight zero contributes nothing, not 0 * inf = nan
    total = torch.einsum("nti,nto,n->oi", A[kept].to(dtype), B[kept].to(dtype), w[kept].to(dtype))
    return total.to(A.dtype)
