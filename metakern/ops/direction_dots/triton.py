"""direction_dots in Triton: a tile of A V^T is contracted with B in registers and never written out.

Every program writes the dots of its rows over its columns to a place of its own, and the places are added afterwards
in a fixed order: no atomics, the same result in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.tiles import tile_for
from metakern.ops.triton_backend import interpreting, precision


@triton.jit
def direction_dots_kernel(
    A, V, B, partial, rows, t, i, o,
    stride_an, stride_at, stride_ai, stride_vo, stride_vi, stride_bn, stride_bt, stride_bo,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial[column tile, row] = sum over the tile's outputs o of B[row, o] (A V^T)[row, o]."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    # rows past the end read the last one: an address that exists is cheaper than a mask in the loop
    example = (tl.minimum(row, rows - 1) // t).to(tl.int64)
    position = (tl.minimum(row, rows - 1) % t).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    a_row = A + example * stride_an + position * stride_at
    v_row = V + tl.minimum(column, o - 1).to(tl.int64) * stride_vo
    product = tl.zeros((M, N), tl.float32)
    for start in range(0, i, K):
        k = start + tl.arange(0, K)
        inside = k < i
        offset = k.to(tl.int64)
        a = tl.load(a_row[:, None] + (offset * stride_ai)[None, :], mask=inside[None, :], other=0.0)
        v = tl.load(v_row[None, :] + (offset * stride_vi)[:, None], mask=inside[:, None], other=0.0)
        if UPCAST:
            a, v = a.to(tl.float32), v.to(tl.float32)
        product = tl.dot(a, v, product, input_precision=PRECISION)
    b_row = B + example * stride_bn + position * stride_bt
    b = tl.load(b_row[:, None] + (column.to(tl.int64) * stride_bo)[None, :], mask=(column < o)[None, :], other=0.0)
    dots = tl.sum(product * b.to(tl.float32), axis=1)
    tl.store(partial + tl.program_id(1).to(tl.int64) * rows + row, dots, mask=row < rows)


def direction_dots(A: Tensor, V: Tensor, B: Tensor) -> Tensor:
    if A.shape[2] < B.shape[2] and A.dtype is B.dtype:  # the product B V costs the same and is narrower
        A, V, B = B, V.t(), A
    n, t, i = A.shape
    o = B.shape[2]
    rows = n * t
    if 0 in (rows, i, o):
        return A.new_zeros(n, dtype=torch.float32)
    tile = tile_for("direction_dots", A, rows, o)
    grid = (triton.cdiv(rows, tile.m), triton.cdiv(o, tile.n))
    partial = torch.empty(grid[1], rows, dtype=torch.float32, device=A.device)
    direction_dots_kernel[grid](
        A, V, B, partial, rows, t, i, o, *A.stride(), *V.stride(), *B.stride(),
        M=tile.m, N=tile.n, K=tile.k, PRECISION=precision(A.dtype), UPCAST=interpreting,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial.numel() == n:
        return partial.view(n)
    return partial.view(grid[1], n, t).sum((0, 2))
