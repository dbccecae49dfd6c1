"""embedding_dots: schema, checks, shapes and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.operands import accumulator, check_operands

SCHEMA = "embedding_dots(Tensor indices, Tensor V, Tensor B, int padding_idx=-1, *, str? impl=None) -> Tensor"


def check(indices: Tensor, V: Tensor, B: Tensor, padding_idx: int = -1) -> None:
    check_operands("embedding_dots", {"V": "vo", "B": "nto"}, (V, B))
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding_dots: indices must be int64 or int32; got {indices.dtype}")
    if indices.shape != B.shape[:2]:
        raise ValueError(
            f"embedding_dots: indices must have shape [n, t] = {list(B.shape[:2])}; got {list(indices.shape)}"
        )
    if indices.device != B.device:
        raise ValueError(f"embedding_dots: indices must be on {B.device} like B; got {indices.device}")


def fake(indices: Tensor, V: Tensor, B: Tensor, padding_idx: int = -1) -> Tensor:
    return B.new_empty(B.shape[0], dtype=accumulator(B.dtype))


def flops(indices: Tensor, V: Tensor, B: Tensor, padding_idx: int = -1) -> int:
    return 2 * B.shape[0] * B.shape[1] * B.shape[2]


def example(device: torch.device) -> tuple[Tensor, ...]:
    """Small arguments, for the report and the tests."""
    indices = torch.zeros(2, 3, dtype=torch.int64, device=device)
    return indices, torch.ones(5, 4, device=device), torch.ones(2, 3, 4, device=device)
