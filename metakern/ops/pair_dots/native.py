"""pair_dots by the device's own matrix product: both Gram matrices in tiles of examples, never held whole."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.layout import contract, examples_per_tile, in_columns, product


def pair_dots(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    columns = in_columns(A, B)
    examples = examples_per_tile(A.shape[1], A_meta.shape[0])
    if A.shape[0] <= examples:
        return _tile(A, B, A_meta, B_meta, columns)
    tiles = zip(A.split(examples), B.split(examples), strict=True)
    return torch.cat([_tile(a, b, A_meta, B_meta, columns) for a, b in tiles])


def _tile(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor, columns: bool) -> Tensor:
    inputs, outputs = product(A, A_meta, columns), product(B, B_meta, columns)
    return contract(inputs, outputs.transpose(1, 2) if columns else outputs, columns)
