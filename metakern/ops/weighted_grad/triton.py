"""weighted_grad in Triton: the kept rows of B are scaled into memory of their own, then multiplied with those of A.

Which examples are kept is listed on the device, so the host never waits and the kernels fit into a CUDA graph; rows of
weight zero are never loaded. Tensor cores take operands from shared memory while later ones are on their way to it;
operands scaled inside the product would go through registers. If the output has too few tiles to fill the chip, the
rows are split, and the parts are added in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.tiles import Tile, tile_for
from metakern.ops.triton_backend import interpreting, multiprocessors, precision, shared_memory
from metakern.ops.triton_blocks import copied_in_bulk, described, grouped

MAX_SPLITS = 32
"""Most parts of the rows that have sums of their own, which are added afterwards."""
LEAST = 4
"""Fewest steps of the product that make a part of the rows worth while."""
PARTED = 12
"""What the sums of a part cost, in steps of the product: they are written in float32 and read again. Arithmetic for
half precision on a GPU that copies at 4.3 TB/s and multiplies at 790 TFLOP/s, not measured."""
MAX_BLOCKS = 1024
"""Most programs that scale the rows of the same columns; their last row is then within `MAX_ROWS` and its margin."""
SCALED = Tile(64, 128, 0, 8, 1)
"""Rows and columns of B that a program scales at a time: 16 KiB in half precision, so that a few programs keep a
multiprocessor's memory busy. Not measured."""
PITCH = 16
"""The width of a scaled row is a multiple of this, so that it is copied in wide pieces whatever o is."""
WELL_FILLED = 0.6
"""Share of a block's rows that must be an example's own, lest the copy engine fetch padding. Not measured."""


@triton.jit(do_not_specialize=["n"])
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


@triton.jit(do_not_specialize=["splits"])
def scaled_rows_kernel(
    B, kept, kept_weights, count, scaled, sums, t, o, pitch, splits, stride_bn, stride_bt, stride_bo,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """scaled[row, o] = w B of the kept rows, one after the other, and zero for o up to `pitch`; with SUMS
    sums[split, o] = their sum over the split's rows, before they are rounded.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    rows = tl.load(count) * t
    share = tl.cdiv(tl.cdiv(rows, ROWS), splits) * ROWS
    last = tl.minimum(rows, (split + 1) * share)
    b_column, b_inside = B + column.to(tl.int64) * stride_bo, (column < o)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(split * share, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None]
        example = tl.load(kept + row // t, mask=row < last, other=0).to(tl.int64)
        weight = tl.load(kept_weights + row // t, mask=row < last, other=0.0)
        b_row = example * stride_bn + (row % t).to(tl.int64) * stride_bt
        b = tl.load(b_column[None, :] + b_row[:, None], mask=inside & b_inside, other=0.0)
        product = b.to(tl.float32) * weight[:, None]
        place = (row.to(tl.int64) * pitch)[:, None] + column[None, :]
        tl.store(scaled + place, product.to(scaled.dtype.element_ty), mask=inside & (column < pitch)[None, :])
        if SUMS:
            total += product
    if SUMS:
        tl.store(sums + split * o + column, tl.sum(total, axis=0).to(sums.dtype.element_ty), mask=column < o)


@triton.jit
def _added_to(start, total, output, column, stride_so, stride_si, mask):
    place = (output.to(tl.int64) * stride_so)[:, None] + (column.to(tl.int64) * stride_si)[None, :]
    return total + tl.load(start + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["blocks", "splits"])
def weighted_grad_bulk_kernel(
    A, scaled, kept, count, start, out, blocks, i, o, splits, stride_so, stride_si,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    START: tl.constexpr,
):  # fmt: skip
    """out[split, o, i] = sum over the split's blocks of (w B) A^T; A and the scaled rows as descriptors of [n, t, .].
    With START the first split adds `start`.

    A kept example is cut into `blocks` blocks of K positions; those past its end read as zero.
    """
    down, across = grouped(tl.program_id(0), tl.cdiv(o, M), tl.cdiv(i, N), GROUP)
    split = tl.program_id(1)
    steps = tl.load(count) * blocks
    share = tl.cdiv(steps, splits)
    first = split * share
    last = tl.minimum(steps, first + share)
    total = tl.zeros((M, N), tl.float32)
    if first < last:
        # a loop that might not run is compiled with a wait after every product
        tl.assume(first < last)
        # looked up a step ahead: an address that is loaded in the same step halves the stages of the loop
        example = tl.load(kept + first // blocks)
        for step in range(first, last):
            position = step % blocks * K
            b = scaled.load([step // blocks, position, down * M]).reshape(K, M).T
            a = A.load([example, position, across * N]).reshape(K, N)
            example = tl.load(kept + tl.minimum(step + 1, last - 1) // blocks)
            total = tl.dot(b, a, total, input_precision=PRECISION)
    output, column = down * M + tl.arange(0, M), across * N + tl.arange(0, N)
    held = (output < o)[:, None] & (column < i)[None, :]
    if START:
        total = _added_to(start, total, output, column, stride_so, stride_si, held & (split == 0))
    place = (split.to(tl.int64) * o + output.to(tl.int64))[:, None] * i + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["splits"])
def weighted_grad_kernel(
    A, scaled, kept, count, start, out, t, i, o, pitch, splits, stride_so, stride_si, stride_an, stride_at, stride_ai,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    START: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same through pointers, over rows instead of blocks: any strides, short examples, older chips."""
    down, across = grouped(tl.program_id(0), tl.cdiv(o, M), tl.cdiv(i, N), GROUP)
    output, column = down * M + tl.arange(0, M), across * N + tl.arange(0, N)
    split = tl.program_id(1)
    rows = tl.load(count) * t
    share = tl.cdiv(tl.cdiv(rows, K), splits) * K
    first = split * share
    last = tl.minimum(rows, first + share)
    # masked rather than clamped: the compiler must see that neighbours are adjacent in memory
    b_column, b_inside = scaled + output, (output < pitch)[:, None]
    a_column, a_inside = A + column.to(tl.int64) * stride_ai, (column < i)[None, :]
    total = tl.zeros((M, N), tl.float32)
    if first < last:
        tl.assume(first < last)
        row = first + tl.arange(0, K)
        example = tl.load(kept + row // t, mask=row < last, other=0)
        for begin in range(first, last, K):
            row = begin + tl.arange(0, K)
            inside = row < last
            a_row = example.to(tl.int64) * stride_an + (row % t).to(tl.int64) * stride_at
            b_row = row.to(tl.int64) * pitch
            b = tl.load(b_column[:, None] + b_row[None, :], mask=b_inside & inside[None, :], other=0.0)
            a = tl.load(a_column[None, :] + a_row[:, None], mask=a_inside & inside[:, None], other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            example = tl.load(kept + (row + K) // t, mask=row + K < last, other=0)
            total = tl.dot(b, a, total, input_precision=PRECISION)
    held = (output < o)[:, None] & a_inside
    if START:
        total = _added_to(start, total, output, column, stride_so, stride_si, held & (split == 0))
    place = (split.to(tl.int64) * o + output.to(tl.int64))[:, None] * i + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["count"])
def add_parts_kernel(parts, out, size, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[k] = sum over the parts, in a fixed order, of parts[., k]; rounded once. Count is PARTS at most."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS).to(tl.int64)
    # all at once: a loop would wait for each, and a bias has one program to wait
    held = (part < count)[:, None] & (place < size)[None, :]
    values = tl.load(parts + (part * size)[:, None] + place[None, :], mask=held, other=0.0)
    tl.store(out + place, tl.sum(values, axis=0).to(out.dtype.element_ty), mask=place < size)


def weighted_grad(
    A: Tensor, B: Tensor, w: Tensor, bias: bool = False, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    n, t, i = A.shape
    o = B.shape[2]
    if 0 in (n, t, o):
        nothing = A.new_zeros(o, i) if start is None else start.clone(memory_format=torch.contiguous_format)
        return nothing, A.new_zeros(o if bias else 0)
    kept = torch.empty(n, dtype=torch.int32, device=A.device)
    count = torch.empty((), dtype=torch.int32, device=A.device)
    weights = torch.empty(n, dtype=torch.float32, device=A.device)
    block = min(4096, max(128, triton.next_power_of_2(n)))
    kept_rows_kernel[(1,)](
        w, kept, weights, count, n, w.stride(0), BLOCK=block, num_warps=4 if block < 2048 else 16, enable_fp_fusion=True
    )
    scaled, sums = scaled_rows(B, kept, weights, count, bias)
    return _matrix(A, scaled, o, kept, count, start), sums


def scaled_rows(B: Tensor, kept: Tensor, weights: Tensor, count: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """w B of the kept examples, one after the other, in [n, t, o rounded up]; and its sum, if a bias asks for it."""
    n, t, o = B.shape
    # the interpreter truncates to bfloat16, where a GPU rounds
    dtype = torch.float32 if interpreting and B.dtype is torch.bfloat16 else B.dtype
    scaled = B.new_empty(n, t, PITCH * triton.cdiv(o, PITCH), dtype=dtype)
    tiles = triton.cdiv(o, SCALED.n)
    # a program for every block, if there are no sums to add; those past the last kept row have nothing to do
    splits = min(triton.cdiv(n * t, SCALED.m), MAX_SPLITS if bias else MAX_BLOCKS)
    sums, parts = _outputs(B, splits, (o,)) if bias else (B.new_empty(0),) * 2
    scaled_rows_kernel[(tiles, splits)](
        B, kept, weights, count, scaled, parts, t, o, scaled.shape[2], splits, *B.stride(),
        ROWS=SCALED.m, COLUMNS=SCALED.n, SUMS=bias, **SCALED.options,
    )  # fmt: skip
    return scaled, _added(parts, sums)


def _matrix(A: Tensor, scaled: Tensor, o: int, kept: Tensor, count: Tensor, start: Tensor | None) -> Tensor:
    """start + sum_nt w_n B_nt A_nt^T over the listed examples."""
    n, t, i = A.shape
    if i == 0:
        return A.new_empty(o, i)
    tile = tile_for("weighted_grad", A, o, i)  # m is outputs, n is inputs, k is rows
    tiles = triton.cdiv(o, tile.m) * triton.cdiv(i, tile.n)
    # as if half of the rows were kept: the host does not know how many are
    splits = row_splits(tiles, triton.cdiv(n * t, 2 * tile.k), side_by_side(tile, A))
    out, parts = _outputs(A, splits, (o, i))
    options = dict(
        M=tile.m, N=tile.n, K=tile.k, GROUP=tile.group, PRECISION=precision(A.dtype),
        START=start is not None, **tile.options,
    )  # fmt: skip
    start = out if start is None else start
    blocks = triton.cdiv(t, tile.k)
    if t >= WELL_FILLED * blocks * tile.k and copied_in_bulk(A):
        weighted_grad_bulk_kernel[(tiles, splits)](
            *(described(A, 1, tile.k, tile.n), described(scaled, 1, tile.k, tile.m)),
            *(kept, count, start, parts, blocks, i, o, splits, *start.stride()),
            **options,
        )
    else:
        weighted_grad_kernel[(tiles, splits)](
            *(A, scaled, kept, count, start, parts, t, i, o, scaled.shape[2], splits, *start.stride(), *A.stride()),
            UPCAST=interpreting,
            **options,
        )
    return _added(parts, out)


def _outputs(like: Tensor, splits: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The result, and where the parts of it go: one part is the result itself; several are rounded when added."""
    out = torch.empty(shape, dtype=like.dtype, device=like.device)
    if splits == 1:
        return out, out
    return out, torch.empty(splits, *shape, dtype=torch.float32, device=like.device)


def _added(parts: Tensor, out: Tensor) -> Tensor:
    if parts is not out:
        count, size = parts.shape[0], out.numel()
        several = triton.next_power_of_2(count)  # not one kernel for every count
        block = 4096 // several
        add_parts_kernel[(triton.cdiv(size, block),)](parts, out, size, count, PARTS=several, BLOCK=block)
    return out


def side_by_side(tile: Tile, like: Tensor) -> int:
    """How many programs of the product run at once: the sums of a large tile fill the registers of a multiprocessor,
    and the operands of many stages its shared memory."""
    two = tile.m * tile.n <= 128 * 128 and 2 * tile.staged(like.element_size()) <= shared_memory(like)
    return (2 if two else 1) * multiprocessors(like)


@lru_cache(maxsize=1024)
def row_splits(tiles: int, steps: int, at_a_time: int) -> int:
    """Into how many parts the rows are split, so that the last wave of programs is about as full as others.

    Minimises the number of waves times the steps of a part and what its sums cost.
    """

    def cost(splits: int) -> int:
        waves = triton.cdiv(tiles * splits, at_a_time)
        return waves * (triton.cdiv(steps, splits) + (PARTED if splits > 1 else 0))

    return min(range(1, max(1, min(MAX_SPLITS, steps // LEAST)) + 1), key=cost)
