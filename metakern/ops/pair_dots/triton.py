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
from metakern.ops.triton_blocks import product_of_rows

MOST = 65535
"""The most programs in the second and third dimension of a grid."""


@triton.jit(do_not_specialize=["rows", "t", "m", "s"])
def pair_dots_kernel(
    A, B, A_meta, B_meta, partial, rows, t, m, s, i, o,
    stride_an, stride_at, stride_ai, stride_bn, stride_bt, stride_bo,
    stride_am, stride_as, stride_ai_meta, stride_bm, stride_bs, stride_bo_meta,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial[part, row, meta] = sum over S positions s of a meta example of (A_row . A'_ms)(B_row . B'_ms).

    A tile has N // S meta examples; one of more than S positions has several parts.
    """
    row = tl.program_id(0) * M + tl.arange(0, M)
    # rows past the end read the last one: an address that exists is cheaper than a mask in the loop
    example = (tl.minimum(row, rows - 1) // t).to(tl.int64)
    position = (tl.minimum(row, rows - 1) % t).to(tl.int64)
    part, group = tl.program_id(1), tl.program_id(2) * (N // S)
    column = tl.arange(0, N)
    meta_position = part * S + column % S
    # one meta example: a scalar, rather than one index for each column
    meta_example = (group if S == N else tl.minimum(group + column // S, m - 1)).to(tl.int64)
    meta_row = tl.minimum(meta_position, s - 1).to(tl.int64)
    inputs = product_of_rows(
        A + example * stride_an + position * stride_at, A_meta + meta_example * stride_am + meta_row * stride_as,
        i, stride_ai, stride_ai_meta, M, N, K, PRECISION, UPCAST,
    )  # fmt: skip
    outputs = product_of_rows(
        B + example * stride_bn + position * stride_bt, B_meta + meta_example * stride_bm + meta_row * stride_bs,
        o, stride_bo, stride_bo_meta, M, N, K, PRECISION, UPCAST,
    )  # fmt: skip
    products = tl.where((meta_position < s)[None, :], inputs * outputs, 0.0)
    # 64 bits for the program's first place; from there 32 are enough, and 64 would spill registers in a wide tile
    first = partial + (part.to(tl.int64) * rows + tl.program_id(0) * M) * m + group
    place = tl.arange(0, M) * m
    if S == N:
        tl.store(first + place, tl.sum(products, axis=1), mask=row < rows)
    else:
        dots = tl.sum(tl.reshape(products, (M, N // S, S)), axis=2)
        held = tl.arange(0, N // S)
        tl.store(first + (place[:, None] + held[None, :]), dots, mask=(row < rows)[:, None] & (held < m - group))


def pair_dots(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    n, t, i = A.shape
    if A_meta.dim() == 2:
        return pair_dots(A, B, A_meta.unsqueeze(0), B_meta.unsqueeze(0)).view(n)
    m, s, o = B_meta.shape
    rows = n * t
    if 0 in (rows, i, m, s, o):
        return A.new_zeros(n, m, dtype=torch.float32)
    tile = tile_for("pair_dots", A, rows, m * s)
    positions = positions_of(m, s, tile.n)
    examples, longest = MOST * (tile.n // positions), MOST * positions
    if m > examples:
        some = zip(A_meta.split(examples), B_meta.split(examples))
        return torch.cat([pair_dots(A, B, *meta) for meta in some], 1)
    if s > longest:
        return sum(pair_dots(A, B, *meta) for meta in zip(A_meta.split(longest, 1), B_meta.split(longest, 1)))
    parts = triton.cdiv(s, positions)
    grid = (triton.cdiv(rows, tile.m), parts, triton.cdiv(m, tile.n // positions))
    partial = torch.empty(parts, rows, m, dtype=torch.float32, device=A.device)
    pair_dots_kernel[grid](
        A, B, A_meta, B_meta, partial, rows, t, m, s, i, o,
        *A.stride(), *B.stride(), *A_meta.stride(), *B_meta.stride(),
        M=tile.m, N=tile.n, K=tile.k, S=positions, PRECISION=precision(A.dtype), UPCAST=interpreting,
        **tile.options,
    )  # fmt: skip
    if parts == t == 1:
        return partial.view(n, m)
    return partial.view(parts, n, t, m).sum((0, 2))


def positions_of(m: int, s: int, width: int) -> int:
    """How many of the columns of a tile are positions of one meta example: a power of two, all if there is only one."""
    return width if m == 1 else min(width, triton.next_power_of_2(s))
