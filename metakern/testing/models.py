"""Small networks that tests and benchmarks share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lenet(classes: int = 2, channels: Sequence[int] = (16, 32, 64), hidden: int = 100) -> nn.Sequential:
    """5x5 convolutions with 3x3 stride-2 pools and two linear layers, for 28x28 grey images; in-place ReLUs.

    Source: the network of Ren et al., ICML 2018, section 4.1, as described in their supplement.
    """
    first, second, third = channels
    return nn.Sequential(
        *(nn.Conv2d(1, first, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)),
        *(nn.Conv2d(first, second, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)),
        *(nn.Conv2d(second, third, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)),
        *(nn.Flatten(), nn.Linear(third * 16, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, classes)),
    )


def mlp(width: int = 1024, depth: int = 4, classes: int = 10) -> nn.Sequential:
    """`depth` hidden layers of `width` x `width` with ReLU, and a linear head."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


def conv_net(width: int = 64, depth: int = 5, classes: int = 10, normalised: bool = False) -> nn.Sequential:
    """`depth` 3x3 convolutions of `width` channels with ReLU, two of them followed by a pool, global mean, linear
    head; `normalised` with BatchNorm before every ReLU.
    """
    layers: list[nn.Module] = []
    for index in range(depth):
        norm = [nn.BatchNorm2d(width)] if normalised else []
        layers += [nn.Conv2d(3 if index == 0 else width, width, 3, padding=1), *norm, nn.ReLU()]
        if index in (1, 3):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class Attention(nn.Module):
    """Self-attention from four linear layers; composed of matmul and softmax, or fused
    (`scaled_dot_product_attention`).
    """

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a four times wider MLP with GELU."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, fused)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Token embedding, `depth` blocks, mean over positions, linear head."""

    def __init__(
        self,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        classes: int = 10,
        vocabulary: int = 1000,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads, fused) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))).mean(dim=1))
