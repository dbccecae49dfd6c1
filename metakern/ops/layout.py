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


CHUNK_BYTES = 4 << 20
"""Size of the operands of a chunk of a convolution, which then stay in a CPU's last-level cache: at 32 MB the library
takes twice as long per example as at 8 MB, and results of 4 MB reuse freed memory (docs/measured-facts.md)."""


def examples_per_chunk(A: Tensor, B: Tensor) -> int:
    """How many examples of A [n, ...] and B [n, ...] to convolve at a time; all of them on a GPU, one at least."""
    n = A.shape[0]
    if A.is_cuda or n == 0:
        return max(n, 1)
    each = (A.numel() + B.numel()) * B.element_size() // n
    return min(n, max(1, CHUNK_BYTES // max(each, 1)))
