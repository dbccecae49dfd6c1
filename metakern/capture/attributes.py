"""What modules hold beside parameters and buffers: running values, caches, lists, meters, generators of their own."""

from __future__ import annotations

import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.members import is_torchs_own, keepers_of

_OWN = frozenset(vars(nn.Module()))
_PLAIN = frozenset((int, float, bool, str, tuple, type(None)))
_DEPTH = 3
"""How deep objects and collections are looked into."""
LARGEST_LIST, LARGEST_ARRAY = 4096, 2**20
"""What is larger is taken for data, which a pass reads and does not write."""

PutBack = Callable[[], None]


class _Kept(NamedTuple):
    module: nn.Module
    training: bool
    attributes: dict[str, Any]


class Attributes:
    """The attributes of every module of a model at one moment: which objects they are, and what these hold."""

    def __init__(self, model: nn.Module) -> None:
        self._kept, self._contents = list[_Kept](), list[PutBack]()
        seen: set[int] = set()
        for module in keepers_of(model):
            attributes = {name: value for name, value in vars(module).items() if name not in _OWN}
            self._kept.append(_Kept(module, module.training, attributes))
            if not is_torchs_own(type(module)):
                _look_into((*attributes.values(), type(module)), _DEPTH, seen, self._contents)

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


def _look_into(values: Iterable[Any], depth: int, seen: set[int], found: list[PutBack]) -> None:
    """Add to `found` what puts back the contents of these values, and of what they hold."""
    for value in values:
        if type(value) in _PLAIN or id(value) in seen or (depth < _DEPTH and _is_large(value)):
            continue
        put_back = content_of(value)
        if put_back is None:
            continue
        seen.add(id(value))
        found.append(put_back)
        if depth and len(inside := _inside(value)) <= LARGEST_LIST:
            _look_into(inside, depth - 1, seen, found)


def _is_large(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > LARGEST_ARRAY
    return isinstance(value, (list, deque, dict, set)) and len(value) > LARGEST_LIST


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, deque)):
        return value
    return vars(value).values() if _is_of_user(type(value)) else ()


def content_of(value: Any) -> PutBack | None:
    """A function that puts back what `value` holds now; None for what cannot change or is not looked into."""
    kind = type(value)
    if kind not in _KINDS:
        _KINDS[kind] = next((keep for types, keep in _KEEPERS if issubclass(kind, types)), None)
        if _KINDS[kind] is None:
            _KINDS[kind] = _of_numpy if kind.__module__.startswith("numpy") else _object if _is_of_user(kind) else None
    keep = _KINDS[kind]
    return None if keep is None else keep(value)


@cache
def _is_of_user(kind: type) -> bool:
    """Does a class come from a training run's own code, and not from the standard library or an installed one?"""
    source = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return "__dict__" in dir(kind) and kind.__module__ not in sys.stdlib_module_names and "-packages" not in source


def _object(value: Any) -> PutBack | None:
    if isinstance(value, (nn.Module, types.FunctionType, types.MethodType, types.ModuleType)):
        return None
    return _collection(vars(value))


def _class(value: type) -> PutBack | None:
    """Numbers and collections that the class itself holds."""
    if not _is_of_user(value):
        return None
    return partial(_reset, value, {name: held for name, held in vars(value).items() if type(held) in _PLAIN})


def _reset(value: type, attributes: dict[str, Any]) -> None:
    for name, held in attributes.items():
        if vars(value).get(name) is not held:
            setattr(value, name, held)


def _tensor(value: Tensor) -> PutBack | None:
    if value.grad_fn is not None or value.is_inference() or isinstance(value, nn.Parameter):
        return None
    return partial(_call, value.data.copy_, value.detach().clone())


def _call(function: Callable[[Any], Any], value: Any) -> None:
    function(value)


def _sequence(value: list[Any] | deque[Any]) -> PutBack:
    return partial(_refill, value, list(value))


def _refill(value: list[Any] | deque[Any], items: list[Any]) -> None:
    if len(value) != len(items) or any(a is not b for a, b in zip(value, items)):
        value.clear()
        value.extend(items)


def _collection(value: Any) -> PutBack:
    return partial(_update, value, value.copy())


def _update(value: Any, copy: Any) -> None:
    same = value == copy if isinstance(value, set) else _same_items(value, copy)
    if not same:
        value.clear()
        value.update(copy)


def _same_items(value: dict[Any, Any], copy: dict[Any, Any]) -> bool:
    return value.keys() == copy.keys() and all(value[key] is item for key, item in copy.items())


def _of_numpy(value: Any) -> PutBack | None:
    """Arrays, and generators of either kind."""
    if hasattr(value, "bit_generator"):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if hasattr(value, "set_state"):
        return partial(_call, value.set_state, value.get_state())
    shape = getattr(value, "shape", ())
    if not shape or value.size > LARGEST_ARRAY or not value.flags.writeable:
        return None
    return partial(value.__setitem__, ..., value.copy())


_KEEPERS: list[tuple[Any, Callable[[Any], PutBack | None]]] = [
    (Tensor, _tensor),
    (torch.Generator, lambda value: partial(_call, value.set_state, value.get_state())),
    (random.Random, lambda value: partial(_call, value.setstate, value.getstate())),
    ((list, deque), _sequence),
    ((dict, set), _collection),
    (type, _class),
]
_KINDS: dict[type, Callable[[Any], PutBack | None] | None] = {}
