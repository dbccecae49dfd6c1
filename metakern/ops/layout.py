"""Per-example products without copies: records come as rows [n, t, i] or, from convolutions, as columns [n, i, t]."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.row_dots.api import unchecked as row_dots

TILE_ELEMENTS = 1 << 20
"""Largest temporary of a tiled product, in elements. On the CPU tiles cost nothing and bound the memory: for
n*t = 65536, i = 576, o = 64 one product took 34.9 ms and tiles of this size 32.5 ms (fp32, 2 threads)."""


def in_columns(A: Tensor, B: Tensor) -> bool:
    """True if both [n, t, .] operands are views of tensors that are contiguous along t."""
    return A.stride(1) == 1 and B.stride(1) == 1 and A.stride(2) != 1 and B.stride(2) != 1


def product(A: Tensor, M: Tensor, columns: bool) -> Tensor:
    """A_n M^T for A [n, t, i] and M [r, i]: [n, t, r], or [n, r, t] when the operands lie in columns."""
    if columns:
        return torch.matmul(M, A.transpose(1, 2))
    n, t, i = A.shape
    return torch.mm(A.reshape(n * t, i), M.t()).view(n, t, M.shape[0])


def contract(P: Tensor, B: Tensor, columns: bool) -> Tensor:
    """sum_tr P_ntr B_ntr for the `product` P and B [n, t, r]: the fused row dot where it applies."""
    X, Y = P.flatten(1), (B.transpose(1, 2) if columns else B).flatten(1)
    return row_dots(X, Y)


def examples_per_tile(t: int, width: int) -> int:
    """How many examples share a tile, so that t * width values of each fit `TILE_ELEMENTS`; one at least."""
    return max(1, TILE_ELEMENTS // max(1, t * width))
