"""Whole networks of the kinds that the literature on re-weighting trains: residual, ConvNeXt-like, graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a normalisation each; a strided block shortens its skip path and pads its channels.

    Source: He et al., Deep Residual Learning, CVPR 2016, section 4.2, option A.
    """

    def __init__(self, channels: int, out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.stride, self.pad = stride, out - channels
        self.first, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), norm(out)
        self.second, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), norm(out)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.pad))
        x = self.activation(self.norm1(self.first(x)))
        return self.activation(self.norm2(self.second(x)) + skip)


def resnet(depth: int = 32, width: int = 16, classes: int = 10, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """The CIFAR network of 6 k + 2 layers: images [n, 3, h, w] -> logits [n, C].

    Source: He et al., Deep Residual Learning, CVPR 2016, section 4.2; `norm` makes the normalisation of its channels.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width), nn.ReLU(inplace=True)]
    channels = width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            out = width * 2**stage
            layers.append(ResidualBlock(channels, out, 2 if stage and not block else 1, norm))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class WideBlock(nn.Module):
    """Pre-activation block; a 1x1 convolution on the skip path where the width changes.

    Source: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016, section 2.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.first = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm2, self.second = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.skip = None if channels == out else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(x))
        skip = x if self.skip is None else self.skip(hidden)
        return skip + self.second(F.relu(self.norm2(self.first(hidden))))


def wide_resnet(depth: int, widening: int, classes: int = 10) -> nn.Sequential:
    """WRN-depth-widening for images [n, 3, h, w] -> logits [n, C]; depth is 6 k + 4.

    Source: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016, table 1.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    channels = 16
    for stage in range(3):
        for block in range((depth - 4) // 6):
            out = 16 * widening * 2**stage
            layers.append(WideBlock(channels, out, 2 if stage and not block else 1))
            channels = out
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, classes))


class ChannelsLastNorm(nn.LayerNorm):
    """Layer normalisation over the channels of an image."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Depthwise 7x7 convolution, layer norm, two linear layers, a learned scale per channel, a residual.

    Source: Liu et al., A ConvNet for the 2020s, CVPR 2022, figure 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        hidden = self.scale * self.down(F.gelu(self.up(hidden)))
        return x + hidden.permute(0, 3, 1, 2)


def convnext(width: int = 16, depths: tuple[int, ...] = (1, 1), classes: int = 10) -> nn.Sequential:
    """A small ConvNeXt: images [n, 3, h, w] -> logits [n, C]."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 2, 2), ChannelsLastNorm(width, eps=1e-6)]
    for stage, depth in enumerate(depths):
        if stage:
            layers += [ChannelsLastNorm(width, eps=1e-6), nn.Conv2d(width, 2 * width, 2, 2)]
            width *= 2
        layers += [ConvNextBlock(width) for _ in range(depth)]
    head = nn.Linear(width, classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width, eps=1e-6), head)


class GraphNetwork(nn.Module):
    """Two graph convolutions over one graph: features [N, d] of all its nodes -> logits [N, C].

    The graph is a buffer, D^-1/2 (A + I) D^-1/2 of the edges [2, E]. A batch is a set of nodes, so the loss picks the
    rows: `loss_fn = lambda model, batch: cross_entropy(model(features)[batch[0]], batch[1], reduction="none")`.

    Source: Kipf & Welling, Semi-Supervised Classification with Graph Convolutional Networks, ICLR 2017, equation 9.
    """

    def __init__(self, edges: Tensor, nodes: int, features: int, hidden: int = 16, classes: int = 3) -> None:
        super().__init__()
        adjacency = torch.eye(nodes)
        adjacency[edges[0], edges[1]] = adjacency[edges[1], edges[0]] = 1.0
        scale = adjacency.sum(1).rsqrt()
        self.adjacency: Tensor
        self.register_buffer("adjacency", scale[:, None] * adjacency * scale)
        self.first, self.second = nn.Linear(features, hidden, bias=False), nn.Linear(hidden, classes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.adjacency @ self.second(torch.relu(self.adjacency @ self.first(features)))
