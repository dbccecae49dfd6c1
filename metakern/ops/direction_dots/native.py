"""direction_dots by the device's own matrix product, in tiles of examples.

A hand-written CPU matrix product loses to the library's, so only the order of the work is ours: the narrower of the
two possible products, contracted before it leaves the cache and never held whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.layout import contract, examples_per_tile, in_columns, product
from metakern.ops.operands import EIGHT_BITS


def supports(A: Tensor, V: Tensor, B: Tensor) -> str | None:
    return "no product of eight-bit operands is kept in tiles" if A.dtype is EIGHT_BITS else None


def direction_dots(A: Tensor, V: Tensor, B: Tensor) -> Tensor:
    if A.shape[2] < B.shape[2]:  # B V is narrower than A V^T, and costs the same
        A, V, B = B, V.t(), A
    columns = in_columns(A, B)
    examples = examples_per_tile(A.shape[1], V.shape[0])
    if A.shape[0] <= examples:
        return _tile(A, V, B, columns)
    tiles = zip(A.split(examples), B.split(examples), strict=True)
    return torch.cat([_tile(a, V, b, columns) for a, b in tiles])


def _tile(A: Tensor, V: Tensor, B: Tensor, columns: bool) -> Tensor:
    return contract(product(A, V, columns), B, columns)
