"""pair_dots in Triton: a tile of both Gram matrices is made, multiplied and summed in registers, never written out.

Every program writes the dots of its rows over its meta rows to a place of its own, and the places are added afterwards
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
def _gram(
    row_start, meta_start, width, stride, stride_meta,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """X X'^T for M rows and N meta rows that start at the given addresses."""
    # a loop that might not run is compiled with a wait after every product
    tl.assume(width > 0)
    gram = tl.zeros((M, N), tl.float32)
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        inside = k < width
        offset = k.to(tl.int64)
        x = tl.load(row_start[:, None] + (offset * stride)[None, :], mask=inside[None, :], other=0.0)
        y = tl.load(meta_start[None, :] + (offset * stride_meta)[:, None], mask=inside[:, None], other=0.0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        gram = tl.dot(x, y, gram, input_precision=PRECISION)
    return gram


@triton.jit
def pair_dots_kernel(
    A, B, A_meta, B_meta, partial, rows, t, s, i, o,
    stride_an, stride_at, stride_ai, stride_bn, stride_bt, stride_bo, stride_as, stride_ai_meta, stride_bs,
    stride_bo_meta,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial[meta tile, row] = sum over the tile's meta rows s of (A_row . A'_s)(B_row . B'_s)."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    # rows past the end read the last one: an address that exists is cheaper than a mask in the loop
    example = (tl.minimum(row, rows - 1) // t).to(tl.int64)
    position = (tl.minimum(row, rows - 1) % t).to(tl.int64)
    meta = tl.program_id(1) * N + tl.arange(0, N)
    meta_row = tl.minimum(meta, s - 1).to(tl.int64)
    inputs = _gram(
        A + example * stride_an + position * stride_at, A_meta + meta_row * stride_as, i, stride_ai, stride_ai_meta,
        M, N, K, PRECISION, UPCAST,
    )  # fmt: skip
    outputs = _gram(
        B + example * stride_bn + position * stride_bt, B_meta + meta_row * stride_bs, o, stride_bo, stride_bo_meta,
        M, N, K, PRECISION, UPCAST,
    )  # fmt: skip
    dots = tl.sum(tl.where((meta < s)[None, :], inputs * outputs, 0.0), axis=1)
    tl.store(partial + tl.program_id(1).to(tl.int64) * rows + row, dots, mask=row < rows)


def pair_dots(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    n, t, i = A.shape
    o, s = B.shape[2], A_meta.shape[0]
    rows = n * t
    if 0 in (rows, i, o, s):
        return A.new_zeros(n, dtype=torch.float32)
    tile = tile_for("pair_dots", A, rows, s)
    grid = (triton.cdiv(rows, tile.m), triton.cdiv(s, tile.n))
    partial = torch.empty(grid[1], rows, dtype=torch.float32, device=A.device)
    pair_dots_kernel[grid](
        A, B, A_meta, B_meta, partial, rows, t, s, i, o,
        *A.stride(), *B.stride(), *A_meta.stride(), *B_meta.stride(),
        M=tile.m, N=tile.n, K=tile.k, PRECISION=precision(A.dtype), UPCAST=interpreting,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial.numel() == n:
        return partial.view(n)
    return partial.view(grid[1], n, t).sum((0, 2))
