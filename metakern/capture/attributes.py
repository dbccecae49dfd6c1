"""What modules hold beside parameters and buffers: running values, caches, lists, meters, generators of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from metakern.capture.contents import LARGEST_ARRAY, LARGEST_LIST, PutBack, content_of, inside, size_of
from metakern.capture.members import is_torchs_own, keepers_of

_OWN = frozenset(vars(nn.Module()))
_COLLECTIONS = frozenset((list, dict, set, deque))
_PLAIN = frozenset((int, float, bool, str, tuple, type(None)))
_DEPTH, _DEEP = 3, 9
"""Levels of nesting of objects and collections that are looked into, and before passes with NaN in them."""


class _Kept(NamedTuple):
    module: nn.Module
    training: bool
    attributes: dict[str, Any]


class Attributes:
    """The attributes of every module of a model at one moment: which objects they are, and what these hold."""

    def __init__(self, model: nn.Module, *, deep: bool = False) -> None:
        self._kept, self._contents = list[_Kept](), list[PutBack]()
        seen: set[int] = set()
        for module in keepers_of(model):
            attributes = {name: value for name, value in vars(module).items() if name not in _OWN}
            self._kept.append(_Kept(module, module.training, attributes))
            if is_torchs_own(type(module)):  # what it has itself never changes; others may have given it a list
                held = [value for value in attributes.values() if type(value) in _COLLECTIONS]
            else:
                held = [*attributes.values(), type(module)]
            if held:
                _look_into(held, _DEEP if deep else _DEPTH, seen, self._contents)

    def restore(self) -> None:
        for kept in self._kept:
            now = vars(kept.module)
            for name in [name for name in now if name not in _OWN and name not in kept.attributes]:
                del now[name]
            for name, value in kept.attributes.items():
                if name not in now or now[name] is not value:
                    now[name] = value
            if kept.module.training is not kept.training:
                kept.module.training = kept.training
        for put_back in self._contents:
            put_back()


def _look_into(values: Iterable[Any], depth: int, seen: set[int], found: list[PutBack], nested: bool = False) -> None:
    """Add to `found` what puts back the contents of these values, and of what they hold."""
    for value in values:
        if type(value) in _PLAIN or id(value) in seen or (nested and _is_large(value)):
            continue
        put_back = content_of(value)
        if put_back is None:
            continue
        seen.add(id(value))
        found.append(put_back)
        if depth and size_of(value) <= LARGEST_LIST:
            _look_into(inside(value), depth - 1, seen, found, nested=True)


def _is_large(value: Any) -> bool:
    return (value.numel() if isinstance(value, Tensor) else size_of(value)) > LARGEST_ARRAY
