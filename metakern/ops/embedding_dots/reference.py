"""embedding_dots in plain PyTorch: any device, any dtype; the truth for the other implementations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from metakern.ops.operands import accumulator


def embedding_dots(indices: Tensor, V: Tensor, B: Tensor, padding_idx: int = -1) -> Tensor:
    dtype = accumulator(B.dtype)
    rows = torch.linalg.vecdot(F.embedding(indices, V).to(dtype), B.to(dtype))
    return rows.masked_fill_(indices == padding_idx, 0).sum(1)
