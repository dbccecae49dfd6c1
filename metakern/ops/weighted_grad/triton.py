"""weighted_grad in Triton: the weight is applied to B as it is loaded, and rows of weight zero are never loaded.

Which rows are kept is listed on the device, so the host never waits and the kernels fit into a CUDA graph. Where the
output has too few tiles to fill the chip, the rows are split, and the parts are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.tiles import tile_for
from metakern.ops.triton_backend import interpreting, precision

PROGRAMS = 264
"""Wanted at least: two for each multiprocessor of the largest chips."""
MAX_SPLITS = 32
LIST_BLOCK = 1024


@triton.jit
def kept_rows_kernel(w, kept, kept_weights, count, n, stride, BLOCK: tl.constexpr):
    """kept[0 .. count) = the examples whose weight is not zero, in order, with their weights. One program."""
    total = 0
    for start in range(0, n, BLOCK):
        example = start + tl.arange(0, BLOCK)
        weight = tl.load(w + example.to(tl.int64) * stride, mask=example < n, other=0.0)
        keep = (weight != 0).to(tl.int32)
        place = total + tl.cumsum(keep, 0) - 1
        tl.store(kept + place, example, mask=keep != 0)
        tl.store(kept_weights + place, weight.to(tl.float32), mask=keep != 0)
        total += tl.sum(keep, 0)
    tl.store(count, total)


@triton.jit
def weighted_grad_kernel(
    A, B, kept, kept_weights, count, out, shift, t, i, o, splits,
    stride_an, stride_at, stride_ai, stride_bn, stride_bt, stride_bo,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """out[split, o, i] = sum over the split's kept rows of w B A^T, and shift[split, o] that of w B."""
    output = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    split = tl.program_id(2)
    rows = tl.load(count) * t
    share = tl.cdiv(tl.cdiv(rows, K), splits) * K
    last = tl.minimum(rows, (split + 1) * share)
    # masked rather than clamped: the compiler must see that neighbours are adjacent in memory
    b_column, b_inside = B + output.to(tl.int64) * stride_bo, (output < o)[:, None]
    a_column, a_inside = A + column.to(tl.int64) * stride_ai, (column < i)[None, :]
    total = tl.zeros((M, N), tl.float32)
    sums = tl.zeros((M,), tl.float32)
    for start in range(split * share, last, K):
        row = start + tl.arange(0, K)
        inside = row < last
        example = tl.load(kept + row // t, mask=inside, other=0).to(tl.int64)
        weight = tl.load(kept_weights + row // t, mask=inside, other=0.0)
        position = (row % t).to(tl.int64)
        b_row = example * stride_bn + position * stride_bt
        a_row = example * stride_an + position * stride_at
        b = tl.load(b_column[:, None] + b_row[None, :], mask=b_inside & inside[None, :], other=0.0)
        a = tl.load(a_column[None, :] + a_row[:, None], mask=a_inside & inside[:, None], other=0.0)
        scaled = b.to(tl.float32) * weight[None, :]
        if BIAS:  # noqa: SIM102 - known when compiled, the other is not
            if tl.program_id(1) == 0:
                sums += tl.sum(scaled, axis=1)
        if UPCAST:
            a = a.to(tl.float32)
        total = tl.dot(scaled.to(a.dtype), a, total, input_precision=PRECISION)
    place = (split.to(tl.int64) * o + output.to(tl.int64))[:, None] * i + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=b_inside & a_inside)
    if BIAS:  # noqa: SIM102
        if tl.program_id(1) == 0:
            tl.store(shift + split.to(tl.int64) * o + output, sums.to(shift.dtype.element_ty), mask=output < o)


def weighted_grad(A: Tensor, B: Tensor, w: Tensor, bias: bool = False) -> tuple[Tensor, Tensor]:
    n, t, i = A.shape
    o = B.shape[2]
    if 0 in (n, t, o) or (i == 0 and not bias):
        return A.new_zeros(o, i), A.new_zeros(o if bias else 0)
    kept = torch.empty(n, dtype=torch.int32, device=A.device)
    count = torch.empty((), dtype=torch.int32, device=A.device)
    kept_weights = torch.empty(n, dtype=torch.float32, device=A.device)
    kept_rows_kernel[(1,)](w, kept, kept_weights, count, n, w.stride(0), BLOCK=LIST_BLOCK, num_warps=4)
    tile = tile_for("weighted_grad", A, o, i)  # m is outputs, n is inputs, k is rows
    tiles = (triton.cdiv(o, tile.m), max(1, triton.cdiv(i, tile.n)))  # without inputs there still is a bias
    splits = row_splits(tiles[0] * tiles[1], triton.cdiv(n * t, tile.k))
    # parts are rounded once, after they are added
    dtype = A.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, o, i, dtype=dtype, device=A.device)
    shift = torch.empty(splits, o if bias else 0, dtype=dtype, device=A.device)
    weighted_grad_kernel[(*tiles, splits)](
        A, B, kept, kept_weights, count, out, shift, t, i, o, splits, *A.stride(), *B.stride(),
        M=tile.m, N=tile.n, K=tile.k, PRECISION=precision(A.dtype), UPCAST=interpreting, BIAS=bias,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return (out[0], shift[0]) if splits == 1 else (out.sum(0).to(A.dtype), shift.sum(0).to(A.dtype))


def row_splits(tiles: int, steps: int) -> int:
    """Into how many parts the rows are split: enough programs for the chip, some steps of work left in each."""
    return max(1, min(MAX_SPLITS, triton.cdiv(PROGRAMS, tiles), steps // 4))
