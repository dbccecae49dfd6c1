"""What modules hold beside parameters and buffers: running values, caches, lists, generators of their own."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.members import modules_of

_OWN = frozenset(vars(nn.Module()))
_PLAIN = frozenset((int, float, bool, str, tuple, type(None)))


class _Kept(NamedTuple):
    module: nn.Module
    attributes: dict[str, Any]
    contents: list[Callable[[], None]]  # each puts back what one attribute held


class Attributes:
    """The attributes of every module of a model at one moment: which objects they are, and what these hold."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = []
        for module in modules_of(model):
            attributes = {name: value for name, value in vars(module).items() if name not in _OWN}
            found = [content_of(value) for value in attributes.values() if type(value) not in _PLAIN]
            contents = [put_back for put_back in found if put_back is not None]
            self._kept.append(_Kept(module, attributes, contents))

    def restore(self) -> None:
        for kept in self._kept:
            now = vars(kept.module)
            for name in [name for name in now if name not in _OWN and name not in kept.attributes]:
                del now[name]
            for name, value in kept.attributes.items():
                if name not in now or now[name] is not value:
                    now[name] = value
            for put_back in kept.contents:
                put_back()


def content_of(value: Any) -> Callable[[], None] | None:
    """A function that puts back what `value` holds now; None for what cannot change or is not looked into."""
    kind = type(value)
    if kind not in _KINDS:
        own = _numpy_generator if kind.__module__.startswith("numpy.random") else None  # numpy need not be installed
        _KINDS[kind] = next((keep for types, keep in _KEEPERS if issubclass(kind, types)), own)
    keep = _KINDS[kind]
    return None if keep is None else keep(value)


def _tensor(value: Tensor) -> Callable[[], None] | None:
    if value.grad_fn is not None or value.is_inference():
        return None
    return partial(_call, value.data.copy_, value.detach().clone())


def _call(function: Callable[[Any], Any], value: Any) -> None:
    function(value)


def _sequence(value: list[Any] | deque[Any]) -> Callable[[], None]:
    return partial(_refill, value, list(value))


def _refill(value: list[Any] | deque[Any], items: list[Any]) -> None:
    if len(value) != len(items) or any(a is not b for a, b in zip(value, items)):
        value.clear()
        value.extend(items)


def _collection(value: Any) -> Callable[[], None]:
    return partial(_update, value, value.copy())


def _update(value: Any, copy: Any) -> None:
    same = value == copy if isinstance(value, set) else _same_items(value, copy)
    if not same:
        value.clear()
        value.update(copy)


def _same_items(value: dict[Any, Any], copy: dict[Any, Any]) -> bool:
    return value.keys() == copy.keys() and all(value[key] is item for key, item in copy.items())


def _numpy_generator(value: Any) -> Callable[[], None] | None:
    if not hasattr(value, "bit_generator"):
        return None
    return partial(setattr, value.bit_generator, "state", value.bit_generator.state)


_KEEPERS: list[tuple[Any, Callable[[Any], Callable[[], None] | None]]] = [
    (Tensor, _tensor),
    (torch.Generator, lambda value: partial(_call, value.set_state, value.get_state())),
    (random.Random, lambda value: partial(_call, value.setstate, value.getstate())),
    ((list, deque), _sequence),
    ((dict, set), _collection),
]
_KINDS: dict[type, Callable[[Any], Callable[[], None] | None] | None] = {}
