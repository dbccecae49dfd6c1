"""weighted_grad by the device's own matrix product over the kept rows only.

Short examples are gathered into one product. From `LOOP_ELEMENTS` values per example the copy costs more than it
saves, and one product per example accumulates in place of it: n = 128, t = 1024, i = 576, o = 64 with 70 rows kept
took 81 ms gathered, 36 ms in a loop and 63 ms over all 128 (fp32, 2 threads).
"""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator

LOOP_ELEMENTS = 1 << 16


def weighted_grad(A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    if A.shape[2] < B.shape[2]:  # scale the narrower operand
        return _scaled_product(B, A, w).t()
    return _scaled_product(A, B, w)


def _scaled_product(wide: Tensor, narrow: Tensor, w: Tensor) -> Tensor:
    """sum_nt w_n narrow_nt wide_nt^T."""
    kept = w.nonzero().squeeze(1)
    t, width = wide.shape[1:]
    if t * width >= LOOP_ELEMENTS and wide.dtype is accumulator(wide.dtype):
        return _by_example(wide, narrow, w.to(wide.dtype), kept)
    if len(kept) < len(w):
        wide, narrow, w = wide.index_select(0, kept), narrow.index_select(0, kept), w.index_select(0, kept)
    # type promotion keeps the product in w's precision until it is rounded once
    scaled = (narrow * w.view(-1, 1, 1)).to(narrow.dtype)
    return torch.mm(scaled.flatten(0, 1).t(), wide.flatten(0, 1))


def _by_example(wide: Tensor, narrow: Tensor, w: Tensor, kept: Tensor) -> Tensor:
    out = wide.new_zeros(narrow.shape[2], wide.shape[2])
    for n in kept.tolist():
        torch.addmm(out, (narrow[n] * w[n]).t(), wide[n], out=out)
    return out
