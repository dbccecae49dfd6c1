"""pair_dots in one expression of PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator


def pair_dots(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    dtype = accumulator(A.dtype)
    inputs = torch.einsum("nti,...si->n...ts", A.to(dtype), A_meta.to(dtype))
    outputs = torch.einsum("nto,...so->n...ts", B.to(dtype), B_meta.to(dtype))
    return torch.einsum("n...ts,n...ts->n...", inputs, outputs)
