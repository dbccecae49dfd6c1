"""The Python numbers that a call is made with: which rows it takes, along which dimension, into which shape.

Two passes of the same operations at the same sizes may still treat rows differently: `softmax` over another dimension,
a view into other groups, another list of rows, padding that moves rows by one. What differs is among these numbers.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor


def numbers_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, ...]:
    """Whole numbers, words and truth values among the arguments, in nested lists too. Of fractions only those that are
    whole: others scale values, and pick no rows.
    """
    found = [_plain(value) for value in args if not isinstance(value, Tensor)]
    if kwargs:
        found += [(key, _plain(value)) for key, value in kwargs.items() if not isinstance(value, Tensor)]
    return tuple(found)


def _plain(value: Any) -> Hashable:
    kind = type(value)
    if kind is int:
        return 2 * value + 1  # odd numbers: hash(-1) == hash(-2), and dim=-1 must not be taken for dim=-2
    if kind is float:
        return 2 * int(value) + 1 if value.is_integer() else None
    if kind is str or kind is bool:
        return value
    if kind is slice:
        return _plain(value.start), _plain(value.stop), _plain(value.step)
    if isinstance(value, (tuple, list)):
        return tuple([_plain(item) for item in value])
    if isinstance(value, range):
        return value.start, value.stop, value.step
    return value.tobytes() if hasattr(value, "tobytes") else None  # arrays of NumPy
