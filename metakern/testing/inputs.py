"""Seeded tensors, and the awkward layouts that correct code must not mind."""

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    """A generator of its own: a test's numbers depend on its seed and on nothing that ran before."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """Standard normal numbers, drawn in float64 so that every dtype rounds the same numbers."""
    drawn = torch.randn(*shape, generator=generator(seed), dtype=torch.float64, device="cpu")
    return drawn.to(device=device, dtype=dtype)


def labels(*shape: int, classes: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Class indices in [0, classes)."""
    return torch.randint(classes, shape, generator=generator(seed), device="cpu").to(device)


def non_contiguous(tensor: Tensor) -> Tensor:
    """The same values as every other element of a wider tensor; the gaps hold NaN, so a read of the wrong element
    shows.

    Integers cannot hold NaN: their gaps hold the largest value, which is no valid index.
    """
    gap = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    wide = torch.full((*tensor.shape, 2), gap, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the first two dimensions swapped in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def channels_last(tensor: Tensor) -> Tensor:
    """The same values in channels_last (4-D) or channels_last_3d (5-D) order."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.dim() not in layout:
        raise ValueError(f"tensor: channels_last needs 4 or 5 dimensions, got {tensor.dim()}")
    return tensor.contiguous(memory_format=layout[tensor.dim()])


def pair(
    n: int, m: int, *shape: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A train batch of n and a meta batch of m examples of `shape`, each `(inputs, targets)`."""
    return (
        (
            normal(n, *shape, seed=seed, dtype=dtype, device=device),
            labels(n, classes=classes, seed=seed + 1, device=device),
        ),
        (
            normal(m, *shape, seed=seed + 2, dtype=dtype, device=device),
            labels(m, classes=classes, seed=seed + 3, device=device),
        ),
    )
