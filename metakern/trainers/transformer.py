"""A small transformer encoder for texts, trained from scratch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x[n, t, d] -> [n, t, d]: attention and a perceptron of width 4 d, each after its own LayerNorm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        n, t, d = x.shape
        query, key, value = self.attention_in(self.norms[0](x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None, None, :])
        x = x + self.dropout(self.attention_out(attended.transpose(1, 2).reshape(n, t, d)))
        return x + self.dropout(self.perceptron(self.norms[1](x)))


class Transformer(nn.Module):
    """tokens[n, t] int64, 0 after the end -> logits[n, C]; features are the mean over the tokens.

    Learned positions, pre-norm blocks. An empty text is treated as a single padding token.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        classes: int,
        *,
        width: int = 64,
        heads: int = 4,
        blocks: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        visible = tokens != 0
        visible = torch.cat([torch.ones_like(visible[:, :1]), visible[:, 1:]], 1)
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, visible)
        shown = visible.unsqueeze(2).to(x)
        return self.head((self.norm(x) * shown).sum(1) / shown.sum(1))
