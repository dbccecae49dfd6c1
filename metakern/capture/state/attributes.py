"""What modules hold beside parameters and buffers: running values, caches, lists, meters, generators of their own."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from metakern.capture.members import OWN, is_torchs_own, keepers_of
from metakern.capture.state.contents import LARGEST_ARRAY, LARGEST_LIST, PLAIN, PutBack, content_of, inside, size_of

_COLLECTIONS = frozenset((list, dict, set, deque))
_UNSEARCHED = PLAIN | {tuple}
_DEPTH, _DEEP = 3, 9
"""How many levels of nested objects and collections are searched: normally, and before passes with NaN."""


class Namespace(NamedTuple):
    """A copy of a module's `__dict__`, torch's own entries included: copying all is cheaper than selecting."""

    module: nn.Module
    held: dict[str, Any]

    def unchanged(self) -> bool:
        now = vars(self.module)
        return len(now) == len(self.held) and all(map(operator.is_, now.values(), self.held.values()))

    def restore(self) -> None:
        now = vars(self.module)
        for name in [name for name in now if name not in OWN and name not in self.held]:
            del now[name]
        now.update((name, value) for name, value in self.held.items() if name not in OWN or name == "training")


class Attributes:
    """The attributes of every module of a model at one moment: which objects they are, and what these hold."""

    def __init__(self, model: nn.Module, *, deep: bool = False) -> None:
        self._kept = [Namespace(module, vars(module).copy()) for module in keepers_of(model)]
        self._contents = dict[int, PutBack]()
        for module, held in self._kept:
            if not is_torchs_own(type(module)):
                values = [value for name, value in held.items() if name not in OWN]
                _look_into((*values, type(module)), _DEEP if deep else _DEPTH, self._contents)
            elif deep or module._forward_hooks or module._forward_pre_hooks:
                # The attributes of torch's own modules never change, but hooks may fill a list that others set on one.
                values = [value for name, value in held.items() if name not in OWN and type(value) in _COLLECTIONS]
                _look_into(values, _DEEP if deep else _DEPTH, self._contents)

    def restore(self) -> None:
        for kept in self._kept:
            if not kept.unchanged():
                kept.restore()
        for put_back in self._contents.values():
            put_back()


def _look_into(values: Iterable[Any], depth: int, found: dict[int, PutBack], nested: bool = False) -> None:
    """Add to `found` functions that restore the contents of these values, and of what they hold."""
    for value in values:
        if type(value) in _UNSEARCHED or id(value) in found or (nested and _is_large(value)):
            continue
        put_back = content_of(value)
        if put_back is None:
            continue
        found[id(value)] = put_back
        if depth and size_of(value) <= LARGEST_LIST:
            _look_into(inside(value), depth - 1, found, nested=True)


def _is_large(value: Any) -> bool:
    return (value.numel() if isinstance(value, Tensor) else size_of(value)) > LARGEST_ARRAY
