"""direction_dots in Triton: a tile of A V^T is contracted with B in registers and never written out.

Every program writes the dots of its rows over its columns to a place of its own, and the places are added afterwards
in a fixed order: no atomics, the same result in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.operands import EIGHT_BITS
from metakern.ops.tiles import Tile, tile_for
from metakern.ops.triton_backend import interpreting, precision
from metakern.ops.triton_blocks import copied_in_bulk, described, grouped, product_of_rows, rows_of


@triton.jit(do_not_specialize=["rows"])
def direction_dots_bulk_kernel(
    A, V, B, partial, rows, i, o,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, OUTPUTS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[column tile, row] = sum over the tile's outputs o of B[row, o] (A V^T)[row, o]; operands as descriptors.

    V is [o, i], or [i, o] without OUTPUTS_FIRST.
    """
    # a loop that might not run is compiled with a wait after every product
    tl.assume(i > 0)
    down, across = grouped(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(o, N), GROUP)
    product = tl.zeros((M, N), tl.float32)
    for start in range(0, i, K):
        a = A.load([down * M, start])
        v = V.load([across * N, start]).T if OUTPUTS_FIRST else V.load([start, across * N])
        product = tl.dot(a, v, product, input_precision=PRECISION, max_num_imprecise_acc=K)
    b = B.load([down * M, across * N])
    # selected, not multiplied by zero: past the last column the product may be infinity times zero
    inside = (across * N + tl.arange(0, N) < o)[None, :]
    dots = tl.sum(tl.where(inside, product * b.to(tl.float32), 0.0), axis=1)
    row = down * M + tl.arange(0, M)
    tl.store(partial + across.to(tl.int64) * rows + row, dots, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "t"])
def direction_dots_kernel(
    A, V, B, partial, rows, t, i, o,
    stride_an, stride_at, stride_ai, stride_vo, stride_vi, stride_bn, stride_bt, stride_bo,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The same through pointers: operands with any strides, chips without a copy engine."""
    down, across = grouped(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(o, N), GROUP)
    row = down * M + tl.arange(0, M)
    # rows past the end read the last one: an address that exists is cheaper than a mask in the loop
    example = (tl.minimum(row, rows - 1) // t).to(tl.int64)
    position = (tl.minimum(row, rows - 1) % t).to(tl.int64)
    column = across * N + tl.arange(0, N)
    a_row = A + example * stride_an + position * stride_at
    v_row = V + tl.minimum(column, o - 1).to(tl.int64) * stride_vo
    product = product_of_rows(a_row, v_row, i, stride_ai, stride_vi, M, N, K, PRECISION, UPCAST)
    b_row = B + example * stride_bn + position * stride_bt
    b = tl.load(b_row[:, None] + (column.to(tl.int64) * stride_bo)[None, :], mask=(column < o)[None, :], other=0.0)
    # selected, not multiplied by zero: the product may be infinite
    dots = tl.sum(tl.where((column < o)[None, :], product * b.to(tl.float32), 0.0), axis=1)
    tl.store(partial + across.to(tl.int64) * rows + row, dots, mask=row < rows)


def direction_dots(A: Tensor, V: Tensor, B: Tensor) -> Tensor:
    if A.shape[2] < B.shape[2] and A.dtype is B.dtype:  # the product B V costs the same and is narrower
        A, V, B = B, V.t(), A
    n, t, i = A.shape
    o = B.shape[2]
    rows = n * t
    if 0 in (rows, i, o):
        return A.new_zeros(n, dtype=torch.float32)
    tile = tile_for("direction_dots", A, rows, o)
    tiles = triton.cdiv(rows, tile.m), triton.cdiv(o, tile.n)
    partial = torch.empty(tiles[1], rows, dtype=torch.float32, device=A.device)
    options = dict(M=tile.m, N=tile.n, K=tile.k, GROUP=tile.group, PRECISION=precision(A.dtype), **tile.options)
    grid = (tiles[0] * tiles[1],)
    a, b, v = rows_of(A), rows_of(B), V if V.stride(1) == 1 else V.t()
    # tensor cores take eight-bit operands in rows only
    if a is not None and b is not None and copied_in_bulk(a, b, v) and (v is V or A.dtype is not EIGHT_BITS):
        _in_bulk(a, v, b, v is V, partial, grid, tile, options)
    else:
        direction_dots_kernel[grid](
            A, V, B, partial, rows, t, i, o, *A.stride(), *V.stride(), *B.stride(), UPCAST=interpreting, **options
        )
    if partial.numel() == n:
        return partial.view(n)
    return partial.view(tiles[1], n, t).sum((0, 2))


def _in_bulk(
    a: Tensor, v: Tensor, b: Tensor, outputs_first: bool, partial: Tensor, grid: tuple[int], tile: Tile, options: dict
) -> None:
    direction_dots_bulk_kernel[grid](
        described(a, tile.m, tile.k),
        described(v, *((tile.n, tile.k) if outputs_first else (tile.k, tile.n))),
        described(b, tile.m, tile.n),
        *(partial, a.shape[0], a.shape[1], b.shape[1]),
        OUTPUTS_FIRST=outputs_first,
        **options,
    )
