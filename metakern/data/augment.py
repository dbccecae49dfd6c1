"""Random augmentation of training images that does not change their labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, generator: torch.Generator, *, padding: int = 4) -> Tensor:
    """A random crop of each image padded with zeros, mirrored with probability one half.

    images [n, c, h, w] -> [n, c, h, w]; random numbers come from a CPU `generator`.
    Source: He et al., Deep Residual Learning, CVPR 2016, section 4.2, for CIFAR.
    Raises: ValueError for anything but images.
    """
    if images.ndim != 4:
        raise ValueError(f"crop_and_flip takes images [n, c, h, w], got shape {tuple(images.shape)}")
    n, channels, height, width = images.shape

    def lines(size: int) -> Tensor:
        start = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
        return start + torch.arange(size)

    rows, columns = lines(height), lines(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    places = (torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(-1, 1, 1))
    places = (*places, rows.view(n, 1, -1, 1), columns.view(n, 1, 1, -1))
    cut = padded[tuple(place.to(images.device) for place in places)]
    return cut.to(memory_format=torch.channels_last) if _channels_last(images) else cut


def _channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
