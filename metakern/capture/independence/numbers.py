"""The Python numbers that a call is made with: which rows it takes, along which dimension, into which shape.

Two passes of the same operations at the same sizes may still treat rows differently: `softmax` over another dimension,
a view into other groups, another list of rows, padding that moves rows by one. What differs is among these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor


def numbers_of(args: tuple[Any, ...], kwargs: dict[str, Any], fractions: bool = False) -> tuple[Hashable, ...]:
    """Integers, strings and booleans among the arguments, also in nested lists. Of floats only whole ones count, since
    torch's functions merely scale values by others; with `fractions`, for unknown functions, all of them count.
    """
    found = [plain(value, fractions) for value in args if not isinstance(value, Tensor)]
    if kwargs:
        found += [(key, plain(value, fractions)) for key, value in kwargs.items() if not isinstance(value, Tensor)]
    return tuple(found)


def plain(value: Any, fractions: bool = False) -> Hashable:
    """A hashable form of a value; None if it holds no numbers."""
    kind = type(value)
    if kind is int:
        return 2 * value + 1  # odd numbers: hash(-1) == hash(-2), and dim=-1 must not be taken for dim=-2
    if kind is tuple or kind is list:
        return tuple([plain(item, fractions) for item in value])
    if value is None:
        return None
    if kind is str or kind is bool:
        return str(value)
    if kind is slice:
        return plain(value.start), plain(value.stop), plain(value.step)
    return _of_any_kind(value, fractions)


def _of_any_kind(value: Any, fractions: bool) -> Hashable:
    """Subclasses of numbers and strings, arrays, and whatever else torch takes for a number or a list of them."""
    if isinstance(value, float):
        if value.is_integer():
            return 2 * int(value) + 1
        return repr(float(value)) if fractions or not math.isfinite(value) else None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, range):
        return value.start, value.stop, value.step
    if isinstance(value, (type, torch.nn.Module)) or (isinstance(value, Tensor) and not _is_number(value)):
        return None
    if (as_bytes := getattr(value, "tobytes", None)) is not None:
        return as_bytes()
    if isinstance(value, torch.SymInt):  # a nested tensor's size has no value
        return str(value)
    if hasattr(value, "__index__"):
        return 2 * index(value) + 1
    if isinstance(value, Mapping):
        return tuple([(plain(key), plain(item, fractions)) for key, item in value.items()])
    if isinstance(value, Sequence):
        return tuple([plain(item, fractions) for item in value])
    return None


def _is_number(tensor: Tensor) -> bool:
    """Whether it may stand for a Python number, such as a bound of a slice."""
    return tensor.dim() == 0 and not (tensor.is_floating_point() or tensor.is_complex())
