"""dual_linear in Triton: a tile of the value and of the tangent together, each operand loaded once for both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.triton_backend import Tile, interpreting, precision

TILES = {2: Tile(128, 64, 64, 8, 3), 4: Tile(64, 32, 32, 4, 2)}
"""By the bytes of an element."""


@triton.jit
def dual_linear_kernel(
    A, dA, W, dW, value, tangent, rows, i, o,
    stride_ar, stride_ai, stride_dar, stride_dai, stride_wo, stride_wi, stride_dwo, stride_dwi,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """value = A W^T, tangent = dA W^T + A dW^T."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    # rows past the end read the last one: an address that exists is cheaper than a mask in the loop
    read = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    output = tl.minimum(column, o - 1).to(tl.int64)[None, :]
    y = tl.zeros((M, N), tl.float32)
    dy = tl.zeros((M, N), tl.float32)
    for start in range(0, i, K):
        k = start + tl.arange(0, K)
        across, down = k.to(tl.int64)[None, :], k.to(tl.int64)[:, None]
        inside_across, inside_down = (k < i)[None, :], (k < i)[:, None]
        a = tl.load(A + read * stride_ar + across * stride_ai, mask=inside_across, other=0.0)
        da = tl.load(dA + read * stride_dar + across * stride_dai, mask=inside_across, other=0.0)
        w = tl.load(W + output * stride_wo + down * stride_wi, mask=inside_down, other=0.0)
        dw = tl.load(dW + output * stride_dwo + down * stride_dwi, mask=inside_down, other=0.0)
        if UPCAST:
            a, da, w, dw = a.to(tl.float32), da.to(tl.float32), w.to(tl.float32), dw.to(tl.float32)
        y = tl.dot(a, w, y, input_precision=PRECISION)
        dy = tl.dot(da, w, dy, input_precision=PRECISION)
        dy = tl.dot(a, dw, dy, input_precision=PRECISION)
    place = row.to(tl.int64)[:, None] * o + column[None, :]
    inside = (row < rows)[:, None] & (column < o)[None, :]
    tl.store(value + place, y.to(value.dtype.element_ty), mask=inside)
    tl.store(tangent + place, dy.to(tangent.dtype.element_ty), mask=inside)


def dual_linear(A: Tensor, dA: Tensor, W: Tensor, dW: Tensor) -> tuple[Tensor, Tensor]:
    rows, i = A.shape
    o = W.shape[0]
    if 0 in (rows, i, o):
        return A.new_zeros(rows, o), A.new_zeros(rows, o)
    value = torch.empty(rows, o, dtype=A.dtype, device=A.device)
    tangent = torch.empty(rows, o, dtype=A.dtype, device=A.device)
    tile = TILES[A.element_size()]
    dual_linear_kernel[(triton.cdiv(rows, tile.m), triton.cdiv(o, tile.n))](
        A, dA, W, dW, value, tangent, rows, i, o, *A.stride(), *dA.stride(), *W.stride(), *dW.stride(),
        M=tile.m, N=tile.n, K=tile.k, PRECISION=precision(A.dtype), UPCAST=interpreting,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return value, tangent
