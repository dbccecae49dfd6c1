"""What functions may read: the names that occur in their code, and the objects where these are looked up."""

from __future__ import annotations

import functools
import operator
import types
import weakref
from argparse import Namespace
from collections import ChainMap
from collections.abc import Callable, Container, Mapping
from threading import local
from typing import Any

from torch.distributions import Distribution, Transform

from metakern.capture.state.contents import is_module_of_user
from metakern.capture.state.function_state import FOREIGN, filled_cells


class OwnWords(set[str]):
    """The names in all functions of the user's code, a set that grows as functions are found."""

    __hash__ = object.__hash__  # type: ignore[assignment]


Words = OwnWords | frozenset[str] | None
"""Which attributes of an object count: those named in the user's code or in a library's function, or all (None)."""

_BY_STRING = frozenset("getattr attrgetter vars __dict__ __getattribute__".split())
"""A function with one of these names may access attributes by strings."""

_UNNAMED = frozenset(
    f"__{name}__"
    for name in "call getitem getattr getattribute get iter next len contains bool float int index enter exit add radd "
    "sub rsub mul rmul truediv rtruediv matmul rmatmul pow rpow neg abs lt le gt ge missing floordiv rfloordiv mod "
    "rmod and or xor invert pos eq ne iadd isub imul itruediv round format str hash setitem".split()
) | {"backward", "setup_context", "jvp", "vmap"}
"""Methods that run without being named."""

_NOTHING: Mapping[str, Any] = {}

_HOLDERS = (types.SimpleNamespace, Namespace, local)
"""Classes of the standard library that hold other code's values."""


@functools.lru_cache(4096)
def words_of(code: types.CodeType) -> frozenset[str]:
    """Names of globals and attributes that occur in a function, also in functions defined inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    found = frozenset(code.co_names).union(*map(words_of, inner))
    return found.union(_strings(code.co_consts)) if found & _BY_STRING else found


def _strings(constants: tuple[object, ...]) -> frozenset[str]:
    held = (c for c in constants if isinstance(c, (tuple, frozenset)))
    own = (c for c in constants if isinstance(c, str) and c.isidentifier())
    return frozenset(own).union(*(_strings(tuple(each)) for each in held))


@functools.lru_cache(4096)
def _unnamed(kind: type) -> frozenset[str]:
    """Methods of a class that run without being named: when its objects are called, indexed, added."""
    return _UNNAMED.intersection(*[[name for each in kind.__mro__ for name in vars(each)]])


def named_in(value: Any, words: Container[str]) -> list[tuple[str, Any]]:
    """Attributes of these names of an object or class, its own and inherited, and methods that need no name."""
    kind = value if isinstance(value, type) else type(value)
    unnamed = _unnamed(kind)
    holders = (getattr(value, "__dict__", _NOTHING), *_classes_of(kind))
    return [(name, held[name]) for held in holders for name in held if name in words or name in unnamed]


def function_of(held: Any) -> types.FunctionType | None:
    """The function that an attribute of a class is, or that computes its value."""
    if isinstance(held, property):
        held = held.fget
    elif isinstance(held, (staticmethod, classmethod)):
        held = held.__func__
    elif isinstance(held, functools.cached_property):
        held = held.func
    return held if isinstance(held, types.FunctionType) else None


def constructors_of(value: Any) -> list[types.FunctionType]:
    """What runs where a function that names a class makes an object of it, if the class is the user's."""
    if not isinstance(value, type) or is_foreign(value):
        return []
    found = (function_of(getattr(value, name, None)) for name in ("__init__", "__new__", "__post_init__"))
    return [function for function in found if function is not None]


def called_by(function: types.FunctionType) -> list[Any]:
    """What a function of torch or of the standard library has been made of: what `torch.vmap` maps, what a decorator
    decorates, what `functools.singledispatch` chooses from.
    """
    held = [content for _, content in filled_cells(function)]
    held += [each for entries in held if isinstance(entries, dict) for each in entries.values()]
    held.append(vars(function).get("__wrapped__"))
    return [each for each in held if isinstance(each, _CALLED) or (callable(each) and not is_foreign(each))]


_CALLED = (types.FunctionType, types.MethodType, functools.partial)

_HELD: list[tuple[Any, Callable[[Any], list[Any]]]] = [
    (functools.partialmethod, lambda value: [value.func, *value.args, *value.keywords.values()]),
    (functools.singledispatchmethod, lambda value: [value.dispatcher]),
    (type(functools.cache(id)), lambda value: [value.__wrapped__]),
    (weakref.ReferenceType, lambda value: [value()]),
    (weakref.ProxyTypes, lambda value: [value.__repr__.__self__]),
    (ChainMap, lambda value: value.maps),
    ((Distribution, Transform), lambda value: list(vars(value).values())),
]


@functools.lru_cache(4096)
def _way_to_hold(kind: type) -> Callable[[Any], list[Any]] | None:
    return next((held for kinds, held in _HELD if issubclass(kind, kinds)), None)


def held_by(value: Any) -> list[Any]:
    """What an object of torch or of the standard library calls, refers to, or computes with."""
    way = _way_to_hold(type(value))
    return [] if way is None else way(value)


def names_in(getter: operator.attrgetter[Any] | operator.methodcaller) -> set[str]:
    """The attributes that an `attrgetter` reads, or the method that a `methodcaller` calls."""
    maker, given = getter.__reduce__()[:2]  # a partial, if the method is called with keywords
    strings = [each for each in (*getattr(maker, "args", ()), *given) if isinstance(each, str)]
    return {name for string in strings for name in string.split(".")}


@functools.lru_cache(4096)
def _classes_of(kind: type) -> tuple[Mapping[str, Any], ...]:
    """The dicts in which attributes of a class are looked up, without those of `FOREIGN` packages."""
    return tuple(vars(each) for each in kind.__mro__ if not is_foreign(each))


def _origin(value: Any) -> str:
    """The module that a class, a function, a module or an object comes from."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    return (value if isinstance(value, (type, types.FunctionType)) else type(value)).__module__ or ""


def is_foreign(value: Any) -> bool:
    return _origin(value).partition(".")[0] in FOREIGN and not isinstance(value, _HOLDERS)


def is_own(value: Any) -> bool:
    """Whether it comes from the user's code."""
    return isinstance(value, _HOLDERS) or is_module_of_user(_origin(value))
