"""pair_dots by the device's own matrix product: both Gram matrices in tiles of examples, never held whole."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.layout import examples_per_tile, in_columns
from metakern.ops.operands import accumulator
from metakern.ops.row_dots.api import unchecked as row_dots


def pair_dots(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    columns = in_columns(A, B)
    if A_meta.dim() == 3:
        return _each(A, B, A_meta, B_meta, columns)
    examples = examples_per_tile(A.shape[1], A_meta.shape[0])
    if A.shape[0] <= examples:
        return _tile(A, B, A_meta, B_meta, columns)
    tiles = zip(A.split(examples), B.split(examples), strict=True)
    return torch.cat([_tile(a, b, A_meta, B_meta, columns) for a, b in tiles])


def _tile(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor, columns: bool) -> Tensor:
    inputs, outputs = _gram(A, A_meta, columns), _gram(B, B_meta, columns)
    if columns or A.shape[1] != 1:
        n = A.shape[0]
        size = A.shape[1] * A_meta.shape[0]
        inputs, outputs = inputs.view(n, size), outputs.view(n, size)
    return row_dots(inputs, outputs)


def _each(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor, columns: bool) -> Tensor:
    """[n, m]: tiles of examples and meta examples, one of either at least."""
    t, (m, s) = A.shape[1], A_meta.shape[:2]
    metas = min(max(1, m), examples_per_tile(t, s))
    examples = examples_per_tile(t, metas * s)
    if A.shape[0] <= examples and m <= metas:
        return _each_tile(A, B, A_meta, B_meta, columns)
    meta_tiles = list(zip(A_meta.split(metas), B_meta.split(metas), strict=True))
    rows = [
        torch.cat([_each_tile(a, b, *meta, columns) for meta in meta_tiles], 1)
        for a, b in zip(A.split(examples), B.split(examples), strict=True)
    ]
    return torch.cat(rows)


def _each_tile(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor, columns: bool) -> Tensor:
    (n, t), (m, s) = A.shape[:2], A_meta.shape[:2]
    inputs = _gram(A, A_meta.reshape(m * s, A.shape[2]), columns)
    outputs = _gram(B, B_meta.reshape(m * s, B.shape[2]), columns)
    if columns:
        return row_dots(inputs.view(n * m, s * t), outputs.view(n * m, s * t)).view(n, m)
    if s == 1:
        dots = inputs.to(accumulator(A.dtype)).mul_(outputs)
    else:
        dots = row_dots(inputs.view(n * t * m, s), outputs.view(n * t * m, s)).view(n * t, m)
    return dots if t == 1 else dots.view(n, t, m).sum(1)


def _gram(X: Tensor, X_meta: Tensor, columns: bool) -> Tensor:
    """All positions with all meta positions: [n t, s], or [n, s, t] where the operands lie in columns."""
    if columns:
        return torch.matmul(X_meta, X.transpose(1, 2))
    n, t, width = X.shape
    return torch.mm(X.reshape(n * t, width), X_meta.t())
