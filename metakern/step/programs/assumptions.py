"""The assumptions of a compiled step: everything that its functions read, except the values of tensors.

A program holds the numbers, flags, functions and tensors that it was traced with: the exponent of a loss, a schedule in
a configuration, a list of scales in the model. Whether they are still the same is looked up before every run.
"""

from __future__ import annotations

import functools
import operator
import os
import random
import sys
import types
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Container, Mapping
from contextvars import ContextVar
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from metakern.capture.members import modules_of
from metakern.capture.state.contents import attributes_of
from metakern.capture.state.function_state import filled_cells, globals_of
from metakern.step.programs.forms import TensorForm, form_of, numbers_of
from metakern.step.programs.lookup import (
    OwnWords,
    Words,
    called_by,
    constructors_of,
    function_of,
    held_by,
    is_foreign,
    is_own,
    named_in,
    names_in,
    words_of,
)

_DEPTH = 6
"""How deep to look into the objects of a model, and into libraries."""
_LARGEST = 4096
"""Collections with more entries are taken to be data."""


_BY_VALUE = frozenset((bool, int, float, complex, str, bytes, type(None), TensorForm))
_COLLECTIONS = frozenset((dict, OrderedDict, set, list, tuple))
_FORWARD = frozenset(("forward",))
_ENVIRONMENT = frozenset(("environ", "getenv"))


class Assumptions:
    """What the modules of a model hold, and what functions read, at one moment.

    Of objects outside the model, only attributes whose names occur in one of the functions count, so a trainer's other
    counters may change. With `places`, for CUDA graphs, addresses of tensors count as well, and the values of single
    numbers in CPU tensors.
    """

    def __init__(self, model: nn.Module, *functions: Any, places: bool = False) -> None:
        self._found: list[Any] = []
        self._seen: set[Any] = set()
        self._places = places
        self._ahead: list[tuple[Any, Words, int]] = []
        self._own = OwnWords(("forward",))
        self._objects: list[tuple[Any, int]] = []  # of these, attributes named by an own word count
        self._module(model, self._own, _DEPTH)
        self._ahead += [(function, self._own, _DEPTH) for function in functions]
        self._go_on()
        words = 0
        while len(self._own) > words:
            words = len(self._own)
            for value, depth in list(self._objects):
                self._named(value, self._own, depth)
            self._go_on()

    def _go_on(self) -> None:
        while self._ahead:
            self._visit(*self._ahead.pop())

    def require(self, now: Assumptions) -> None:
        """Raise ValueError if something differs `now`."""
        if now.differs_from(self):
            raise ValueError(
                "model, loss_fn, rule or optimizer: parameters, buffers, state, training flags, attributes, functions "
                f"or numbers that they read are not those that the step was made with ({self._difference(now)}); "
                "make another step, or keep a number that changes in a tensor"
            )

    def _difference(self, now: Assumptions) -> str:
        """The first difference, with the name that precedes it if there is one."""
        name = ""
        for before, after in zip_longest(self._found, now._found):
            if not _same(before, after):
                return f"{name}{before!r:.120} then, {after!r:.120} now"
            name = f"{before}: " if isinstance(before, str) else ""
        return "nothing"

    def differs_from(self, other: Assumptions) -> bool:
        return len(self._found) != len(other._found) or not all(map(_same, self._found, other._found))

    def _visit(self, value: Any, words: Words, depth: int) -> None:
        kind = type(value)
        if kind in _BY_VALUE:
            self._found.append(value)
        elif depth <= 0:
            self._found.append(kind)
        else:
            _way_of(kind)(self, value, words, depth)

    def _first(self, value: Any, way: Any) -> bool:
        """Whether the value is visited for the first time in this way, such as with these words."""
        before = len(self._seen)
        self._seen.add((id(value), way))
        return len(self._seen) > before

    def _module(self, value: nn.Module, words: Words, depth: int) -> None:
        for module in modules_of(value):
            if not self._first(module, None):
                continue
            self._found.append(type(module))
            if self._first(type(module), "of a module"):
                self._attributes(type(module), self._own if is_own(type(module)) else _FORWARD, depth)
            for name, held in vars(module).items():
                kind = type(held)
                if kind in _BY_VALUE:
                    self._found += (name, held)
                elif name == "_parameters" or name == "_buffers":
                    for key, tensor in held.items():
                        self._found.append(key)
                        if tensor is not None:
                            self._tensor(tensor, self._own, depth)
                elif name == "_modules":
                    self._found += (*held, *held.values())
                elif kind is tuple:
                    self._sequence(held, None, depth)
                elif kind not in _COLLECTIONS or held:
                    self._found.append(name)
                    self._ahead.append((held, None, depth))
        if words is not None:
            self._attributes(type(value), words, depth)

    def _tensor(self, value: Tensor, words: Words, depth: int) -> None:
        self._found += (value, form_of(value, self._places))
        if value.__dict__ and self._first(value, "held"):
            self._objects.append((value, depth))

    def _sequence(self, values: Any, words: Words, depth: int) -> None:
        """Items of a collection; neither nesting nor cycles need a limit."""
        self._found += (type(values), len(values))
        if len(values) <= _LARGEST:
            self._found += [item if type(item) in _BY_VALUE else type(item) for item in values]
            others = [(item, words, depth) for item in values if type(item) not in _BY_VALUE]
            if others and self._first(values, ("items", words)):
                self._ahead += others
        if type(values).__dictoffset__:
            self._attributes(values, words, depth)

    def _items(self, values: Mapping[Any, Any], words: Words, depth: int) -> None:
        self._found += (type(values), len(values))
        if len(values) <= _LARGEST and self._first(values, ("items", words)):
            self._found += values
            self._ahead += [(item, words, depth) for item in values.values()]
        if type(values).__dictoffset__:
            self._attributes(values, words, depth)

    def _wrapper(self, value: Any, words: Words, depth: int) -> None:
        self._visit(value.data, words, depth)
        self._attributes(value, words, depth)

    def _partial(self, value: Any, words: Words, depth: int) -> None:
        parts = (value.func, *value.args, *value.keywords.values(), *vars(value).values())
        self._found += (len(value.args), *value.keywords)
        self._ahead += [(part, words, depth) for part in parts]

    def _method(self, value: types.MethodType, words: Words, depth: int) -> None:
        self._ahead += [(value.__func__, words, depth), (value.__self__, words or self._own, depth)]

    def _function(self, function: types.FunctionType, words: Words, depth: int) -> None:
        self._found.append(function)
        own = words_of(function.__code__)
        if not own.isdisjoint(_ENVIRONMENT):
            self._environment()
        if not self._first(function, None):
            return
        if is_foreign(function):
            self._ahead += [(called, words, depth - 1) for called in called_by(function)]
            return
        if is_own(function):
            self._own |= own
            words = self._own
            if vars(function):
                self._attributes(function, words, depth)
        else:
            words, depth = own, depth - 1
        parts = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        parts += [content for _, content in filled_cells(function)]
        names = globals_of(function.__code__)
        parts += [function.__globals__.get(name, sys.modules.get(name)) for name in names]  # imported inside it
        parts.append(vars(function).get("__wrapped__"))
        self._ahead += [(part, words, depth) for part in parts]

    def _object(self, value: Any, words: Words, depth: int) -> None:
        self._found.append(value)
        self._ahead += [(function, words, depth) for function in constructors_of(value)]
        self._ahead += [(held, words, depth - 1) for held in held_by(value)]
        self._attributes(value, words, depth)

    def _getter(self, value: Any, words: Words, depth: int) -> None:
        """An `attrgetter` or a `methodcaller`: looks up its names in whatever it is called with."""
        self._found.append(value)
        self._own |= names_in(value)

    def _attributes(self, value: Any, words: Words, depth: int) -> None:
        """Attributes of an object, class, function or Python module, its own and those of its class."""
        if is_foreign(value):
            return
        if words is not None and words is not self._own and is_own(value):
            self._attributes(value, self._own, depth)
        if not self._first(value, words):
            return
        depth -= words is None or not is_own(value)
        if words is None:
            held = attributes_of(value)
            self._found += held
            self._ahead += [(each, None, depth) for each in held.values()]
            self._attributes(type(value), self._own, depth)
            return
        if words is self._own:
            self._objects.append((value, depth))
        self._named(value, words, depth)
        if isinstance(value, type) and type(value) is not type:
            self._attributes(type(value), words, depth)

    def _named(self, value: Any, words: Container[str], depth: int) -> None:
        """Its attributes of these names, and methods that run without being named; each only once."""
        for name, held in named_in(value, words):
            if self._first(value, (name, words)):
                self._attribute(value, name, held, words, depth)

    def _attribute(self, value: Any, name: str, held: Any, words: Any, depth: int) -> None:
        if isinstance(held, types.MemberDescriptorType) and not isinstance(value, type):  # a slot
            held = attributes_of(value).get(name)
        function = function_of(held)
        self._ahead.append((held if function is None else function, words, depth))
        if function is not None and words is not self._own:
            self._ahead.append((value, words_of(function.__code__), depth))

    def _stepped(self, value: Any, words: Words, depth: int) -> None:
        """The numbers of an optimizer or a scheduler, which a function may read in many ways."""
        self._found.append(value)
        held = vars(value)
        for group in held.get("param_groups", ()):
            self._ahead += [(number, None, 1) for name, number in group.items() if name != "params"]
        asked = ("_last_lr", "optimizer", *(words or ()))
        self._ahead += [(held[name], words, depth - 1) for name in asked if name in held and name != "param_groups"]
        self._attributes(value, words, depth)  # of a class of the user's

    def _environment(self, *_: Any) -> None:
        self._found.append(repr(sorted(os.environ.items())))

    def _context(self, value: ContextVar[Any], words: Words, depth: int) -> None:
        self._ahead.append((value.get(None), words, depth))

    def _numbers(self, value: Any, words: Words, depth: int) -> None:
        self._found.append(numbers_of(value, _LARGEST))


_KINDS: list[tuple[Any, Callable[[Assumptions, Any, Words, int], None]]] = [
    (Tensor, Assumptions._tensor),
    ((list, tuple, deque, set, frozenset), Assumptions._sequence),
    ((dict, types.MappingProxyType), Assumptions._items),
    ((UserDict, UserList), Assumptions._wrapper),
    (types.FunctionType, Assumptions._function),
    (types.MethodType, Assumptions._method),
    (functools.partial, Assumptions._partial),
    ((operator.attrgetter, operator.methodcaller), Assumptions._getter),
    (nn.Module, Assumptions._module),
    ((torch.Generator, random.Random, array, bytearray), Assumptions._numbers),
    (ContextVar, Assumptions._context),
    ((torch.optim.Optimizer, LRScheduler), Assumptions._stepped),
    (type(os.environ), Assumptions._environment),
]


@functools.lru_cache(4096)
def _way_of(kind: type) -> Callable[[Assumptions, Any, Words, int], None]:
    """The method that visits values of this kind."""
    default = Assumptions._numbers if kind.__module__.startswith("numpy") else Assumptions._object
    return next((way for kinds, way in _KINDS if issubclass(kind, kinds)), default)


def _same(left: Any, right: Any) -> bool:
    return left is right or (type(left) is type(right) and type(left) in _BY_VALUE and left == right)
