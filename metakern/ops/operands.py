"""The checks that the operators on layer records share: ranks, sizes, floating dtypes, one dtype, one device."""

from __future__ import annotations

import torch
from torch import Tensor

EIGHT_BITS = torch.float8_e4m3fn
"""The dtype of operands that are rounded to eight bits."""

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def check_operands(
    operator: str, letters: dict[str, str], tensors: tuple[Tensor, ...], rounded: tuple[str, ...] = ()
) -> None:
    """Check tensors against their index letters, e.g. {"A": "nti", "V": "oi"}: one letter is one size.

    Those named in `rounded` may all be float8_e4m3fn while the others are not.

    Raises: TypeError for dtypes, ValueError for ranks, sizes and devices, naming the argument.
    """
    if _fit(letters, tensors):
        return
    named = dict(zip(letters, tensors, strict=True))
    if not (rounded and all(named[name].dtype is EIGHT_BITS for name in rounded)):
        rounded = ()
    like = next(name for name in letters if name not in rounded)
    dtype, device = named[like].dtype, tensors[0].device
    if dtype not in FLOATING:
        raise TypeError(f"{operator}: {like} must be a floating-point tensor; got {dtype}")
    sizes: dict[str, int] = {}
    for (name, axes), tensor in zip(letters.items(), tensors, strict=True):
        shape = tensor.shape
        if len(shape) != len(axes):
            raise ValueError(f"{operator}: {name} must have shape [{', '.join(axes)}]; got {list(shape)}")
        if tensor.dtype != dtype and name not in rounded:
            raise TypeError(f"{operator}: {name} must be {dtype} like {like}; got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{operator}: {name} must be on {device} like {next(iter(letters))}; got {tensor.device}")
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"{operator}: {name} must have shape [{', '.join(axes)}] with {axis} = {sizes[axis]}; "
                    f"got {list(shape)}"
                )


def _fit(letters: dict[str, str], tensors: tuple[Tensor, ...]) -> bool:
    """Whether operands of one dtype fit. Every call pays for this check, so it finds out nothing more."""
    first = tensors[0]
    dtype, device = first.dtype, first.device
    if dtype not in FLOATING:
        return False
    sizes: dict[str, int] = {}
    for axes, tensor in zip(letters.values(), tensors):
        shape = tensor.shape
        if len(shape) != len(axes) or tensor.dtype is not dtype or tensor.device != device:
            return False
        for axis, size in zip(axes, shape):
            if sizes.setdefault(axis, size) != size:
                return False
    return True


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32
