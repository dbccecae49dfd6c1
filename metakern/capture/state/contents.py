"""The contents of an object at one moment, and how to restore them.

They are read and written by the methods of the built-in types: a subclass's own may count look-ups, recompute entries
or evict the oldest, and would then neither show nor restore what it holds.
"""

from __future__ import annotations

import operator
import random
import sys
import types
from argparse import Namespace
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.state.snapshot import Snapshot

LARGEST_LIST, LARGEST_ARRAY = 4096, 2**20
"""Lists with more items, and arrays and tensors with more entries, are taken for data that a pass only reads."""

PLAIN = frozenset((int, float, bool, str, type(None)))
"""Types whose values never change."""

PutBack = Callable[[], None]
_Keep = Callable[[Any], PutBack | None]

_HOLDERS = frozenset((types.SimpleNamespace, Namespace, UserDict, UserList))
"""Classes of the standard library that hold what users put into them."""
_LOOKED_AFTER = (nn.Module, types.FunctionType, types.MethodType, types.ModuleType)


class _Methods(NamedTuple):
    """How to list, empty and fill a built-in collection; a dict is listed as its keys, then its values."""

    listed: Callable[[Any], list[Any]]
    clear: Callable[[Any], None]
    fill: Callable[[Any, list[Any]], None]


def _of_dict(kind: type[dict[Any, Any]]) -> _Methods:
    def fill(value: Any, held: list[Any]) -> None:
        for key, item in zip(held, held[len(held) // 2 :]):
            kind.__setitem__(value, key, item)

    return _Methods(lambda value: [*kind.keys(value), *kind.values(value)], kind.clear, fill)


_COLLECTIONS: dict[type, _Methods] = {
    OrderedDict: _of_dict(OrderedDict),
    dict: _of_dict(dict),
    list: _Methods(list.copy, list.clear, list.extend),
    deque: _Methods(lambda value: list(deque.__iter__(value)), deque.clear, deque.extend),
    set: _Methods(lambda value: list(set.__iter__(value)), set.clear, set.update),
}
_CLASSES = 1024
"""Size of the caches of facts about classes; bounded, since a notebook defines the same class again and again."""
_WRITERS = frozenset("__setitem__ __delitem__ append add insert pop update".split())


def content_of(value: Any) -> PutBack | None:
    """A function that restores what `value` holds now; None if it cannot change or is not searched."""
    keep = _keep_for(type(value))
    return None if keep is None else keep(value)


@lru_cache(_CLASSES)
def _keep_for(kind: type) -> _Keep | None:
    found = next((keep for types, keep in _KEEP_BY_KIND if issubclass(kind, types)), None)
    if found is not None or issubclass(kind, _LOOKED_AFTER):
        return found
    if _is_collection(kind):
        return _collection if _writes_as_built_in(kind) else None
    if kind.__module__.startswith("numpy"):
        return _of_numpy
    return attributes_kept if is_of_user(kind) else None


def is_of_user(kind: type) -> bool:
    """Whether a class is defined in the user's code, or is one of `_HOLDERS`."""
    return kind in _HOLDERS or is_module_of_user(kind.__module__)


@lru_cache(_CLASSES)
def is_module_of_user(name: str) -> bool:
    """Whether a Python module is the user's own: neither installed nor of the standard library."""
    source = getattr(sys.modules.get(name), "__file__", None) or ""
    return name.partition(".")[0] not in sys.stdlib_module_names and "-packages" not in source


@lru_cache(_CLASSES)
def _is_collection(kind: type) -> bool:
    return issubclass(kind, tuple(_COLLECTIONS))


@lru_cache(_CLASSES)
def _methods_of(kind: type) -> tuple[type, _Methods]:
    return next((each, methods) for each, methods in _COLLECTIONS.items() if issubclass(kind, each))


def _writes_as_built_in(kind: type) -> bool:
    """Whether no library class overrides the write methods; one that does may keep related state elsewhere."""
    return all(
        is_of_user(each) or each.__module__ in ("builtins", "collections") or _WRITERS.isdisjoint(vars(each))
        for each in kind.__mro__
    )


def size_of(value: Any) -> int:
    """How many items a collection has; of anything else 0."""
    kind = type(value)
    return _methods_of(kind)[0].__len__(value) if _is_collection(kind) else 0


def inside(value: Any) -> list[Any]:
    """What a value holds: items, attributes and, for objects, the class, whose attributes may be state as well."""
    kind = type(value)
    if isinstance(value, type):
        return [held for each in _classes(value) for held in vars(each).values()]
    held = _methods_of(kind)[1].listed(value) if _is_collection(kind) else []
    if isinstance(value, dict):
        held = held[len(held) // 2 :]
    return [*held, *attributes_of(value).values(), kind] if _has_attributes(kind) else held


@lru_cache(_CLASSES)
def _has_attributes(kind: type) -> bool:
    return is_of_user(kind) and not issubclass(kind, _LOOKED_AFTER)


def _classes(kind: type) -> list[type]:
    return [each for each in kind.__mro__ if is_of_user(each)]


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object by name, from its `__dict__` and its slots."""
    found = dict(vars(value)) if type(value).__dictoffset__ else {}
    for name, slot in _slots(type(value)).items():
        try:
            found[name] = slot.__get__(value)
        except AttributeError:  # not assigned yet
            continue
    return found


@lru_cache(_CLASSES)
def _slots(kind: type) -> dict[str, types.MemberDescriptorType]:
    held = (entry for each in _classes(kind) for entry in vars(each).items())
    return {name: slot for name, slot in held if isinstance(slot, types.MemberDescriptorType)}


def attributes_kept(value: Any) -> PutBack:
    """A function that restores the attributes of an object, whether or not its class is the user's."""
    return partial(_put_attributes_back, value, attributes_of(value))


def _put_attributes_back(value: Any, held: dict[str, Any]) -> None:
    now, slots = attributes_of(value), _slots(type(value))
    for name in now.keys() - held.keys():
        if name in slots:
            slots[name].__delete__(value)
        else:
            del vars(value)[name]
    for name, what in held.items():
        if name not in now or now[name] is not what:
            if name in slots:
                slots[name].__set__(value, what)
            else:
                vars(value)[name] = what


def _class(value: type) -> PutBack | None:
    """Restores the attributes of a class and of its base classes, as far as they are the user's."""
    classes = [(each, dict(vars(each))) for each in _classes(value)]
    return partial(_put_classes_back, classes) if classes else None


def _put_classes_back(classes: list[tuple[type, dict[str, Any]]]) -> None:
    for each, held in classes:
        for name in [name for name in vars(each) if name not in held and not name.startswith("__")]:
            type.__delattr__(each, name)
        for name, what in held.items():
            if vars(each).get(name) is not what:
                type.__setattr__(each, name, what)


def _collection(value: Any) -> PutBack:
    kind = type(value)
    methods = _methods_of(kind)[1]
    put_back = partial(_refill, value, methods, methods.listed(value))
    return partial(_call_all, (put_back, attributes_kept(value))) if _has_attributes(kind) else put_back


def many_plain(values: list[Any]) -> tuple[PutBack, list[Any]]:
    """A function that restores all lists and dicts of plain values among many, such as the entries of a log, and the
    values that are anything else. One by one, they take several times as long.
    """
    logs = [value for value in values if type(value) is dict and PLAIN.issuperset(map(type, value.values()))]
    logs += [value for value in values if type(value) is list and PLAIN.issuperset(map(type, value))]
    known = set(map(id, logs))
    return partial(_put_many_back, logs, [log.copy() for log in logs]), [v for v in values if id(v) not in known]


def _put_many_back(logs: list[Any], held: list[Any]) -> None:
    for log, entries in zip(logs, held):
        if log != entries:
            log.clear()
            log.update(entries) if type(log) is dict else log.extend(entries)


def _refill(value: Any, methods: _Methods, held: list[Any]) -> None:
    now = methods.listed(value)
    if len(now) != len(held) or not all(map(operator.is_, now, held)):
        methods.clear(value)
        methods.fill(value, held)


def _call_all(functions: tuple[PutBack, ...]) -> None:
    for function in functions:
        function()


def _tensor(value: Tensor) -> PutBack | None:
    if value.grad_fn is not None or value.is_inference() or isinstance(value, nn.Parameter):
        return None
    return Snapshot(value).restore


def _call(function: Callable[[Any], Any], value: Any) -> None:
    function(value)


def _array(value: Any) -> PutBack | None:
    """Restores a Python `array` or `bytearray`."""
    kind: Any = array if isinstance(value, array) else bytearray
    whole = slice(None)
    if kind.__len__(value) > LARGEST_ARRAY:
        return None
    return partial(kind.__setitem__, value, whole, kind.__getitem__(value, whole))


def _of_numpy(value: Any) -> PutBack | None:
    """Restores a NumPy array, `Generator` or `RandomState`."""
    if hasattr(value, "bit_generator"):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if hasattr(value, "set_state"):
        return partial(_call, value.set_state, value.get_state())
    shape = getattr(value, "shape", ())
    if not shape or value.size > LARGEST_ARRAY or not value.flags.writeable:
        return None
    return partial(value.__setitem__, ..., value.copy())


_KEEP_BY_KIND: list[tuple[Any, _Keep]] = [
    (Tensor, _tensor),
    (torch.Generator, lambda value: partial(_call, value.set_state, value.get_state())),
    (random.Random, lambda value: partial(_call, value.setstate, value.getstate())),
    ((array, bytearray), _array),
    (type, _class),
]
