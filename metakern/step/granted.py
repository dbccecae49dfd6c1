"""What a compiled step takes for granted: all that its functions look at, but for the values of tensors.

A program holds the numbers, flags, functions and tensors that it was traced with: the exponent of a loss, a schedule in
a configuration, a list of scales in the model. Whether they are still the same is looked up before every run.
"""

from __future__ import annotations

import functools
import random
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.capture.members import modules_of
from metakern.capture.surroundings import FOREIGN, globals_of

_DEPTH = 6
_LARGEST = 4096
"""What holds more entries is taken for data."""


class _Tensor(NamedTuple):
    """A tensor but for its values."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device
    requires_grad: bool
    hooked: bool
    place: int  # in memory; 0 where it does not matter


Names = Iterable[str] | None
"""The attributes of an object that count; None for all, as of what a model holds."""

_BY_VALUE = frozenset((bool, int, float, complex, str, bytes, type(None), _Tensor))
_COLLECTIONS = frozenset((dict, OrderedDict, set, list, tuple))


class Granted:
    """What the modules of a model hold, and what functions look at in a few steps, at one moment.

    Of an object outside the model only those attributes count that the function by which it is reached has a word for:
    what a trainer counts elsewhere may change. `places` asks for tensors to be where they were in memory, too.
    """

    def __init__(self, model: nn.Module, *functions: Any, places: bool = False) -> None:
        self._found: list[Any] = []
        self._seen: set[Any] = set()
        self._places = places
        self._modules(model, _DEPTH)
        for function in functions:
            self._visit(function, (), _DEPTH)

    def require(self, now: Granted) -> None:
        """Raise ValueError where `now` something is another."""
        if now.differs_from(self):
            raise ValueError(
                "model, loss_fn or rule: parameters, buffers, training flags, attributes, functions or numbers that "
                "they look at are not those that the step was made with; make another step, or hold a number that "
                "changes in a tensor"
            )

    def differs_from(self, other: Granted) -> bool:
        return len(self._found) != len(other._found) or not all(map(_same, self._found, other._found))

    def _modules(self, model: nn.Module, depth: int) -> None:
        modules = [module for module in modules_of(model) if id(module) not in self._seen]
        self._seen.update(map(id, modules))
        for module in modules:
            self._found.append(type(module))
            self._attributes(type(module), ("forward",), depth)
            for name, value in vars(module).items():
                if type(value) in _BY_VALUE:
                    self._found += (name, value)
                elif name == "_parameters" or name == "_buffers":
                    for key, tensor in value.items():
                        self._found += (key, tensor, None if tensor is None else self._but_values(tensor))
                elif name == "_modules":
                    self._found += (*value, *value.values())
                elif type(value) not in _COLLECTIONS or value:
                    self._found.append(name)
                    self._visit(value, None, depth)

    def _visit(self, value: Any, names: Names, depth: int) -> None:
        kind = type(value)
        if kind in _BY_VALUE:
            self._found.append(value)
        elif isinstance(value, Tensor):
            self._found += (value, self._but_values(value))
        elif depth <= 0:
            self._found.append(kind)
        elif isinstance(value, (list, tuple, deque)):
            self._sequence(value, names, depth)
        elif isinstance(value, dict):
            self._items(value, names, depth)
        elif isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, types.MethodType):
            self._visit(value.__self__, (value.__func__.__name__,), depth)
        elif isinstance(value, functools.partial):
            self._sequence((value.func, *value.args), names, depth)
            self._items(value.keywords, names, depth)
        elif isinstance(value, nn.Module):
            self._modules(value, depth)
            self._attributes(kind, names or (), depth)
        elif isinstance(value, (torch.Generator, random.Random)):
            self._found.append(repr(value.get_state() if isinstance(value, torch.Generator) else value.getstate()))
        elif kind.__module__.startswith("numpy"):
            self._found.append(_of_numpy(value))
        else:
            self._found.append(value)
            self._attributes(value, None if names is None else ("__call__", *names), depth)

    def _but_values(self, tensor: Tensor) -> _Tensor:
        hooked, place = bool(tensor._backward_hooks), tensor.data_ptr() if self._places else 0
        return _Tensor(tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.requires_grad, hooked, place)

    def _sequence(self, values: Any, names: Names, depth: int) -> None:
        self._found += (type(values), len(values))
        for value in values if len(values) <= _LARGEST else ():
            self._visit(value, names, depth - 1)

    def _items(self, values: dict[Any, Any], names: Names, depth: int) -> None:
        self._found += (type(values), len(values))
        for key, value in values.items() if len(values) <= _LARGEST else ():
            self._found.append(key)
            self._visit(value, names, depth - 1)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        self._found.append(function)
        if id(function) in self._seen or _foreign(function):
            return
        self._seen.add(id(function))
        names = _names_of(function.__code__)
        self._visit(function.__defaults__, names, depth - 1)
        self._visit(function.__kwdefaults__, names, depth - 1)
        for cell in function.__closure__ or ():
            self._visit(_content(cell), names, depth - 1)
        for name in globals_of(function.__code__):
            if name in function.__globals__:
                self._visit(function.__globals__[name], names, depth - 1)

    def _attributes(self, value: Any, names: Names, depth: int) -> None:
        """What an object, a class or a module of Python holds under these names, itself or by its class."""
        if depth <= 0 or _foreign(value):
            return
        holders = _holders(value)
        for name in holders[0] if names is None else names:
            if (id(value), name) in self._seen:
                continue
            self._seen.add((id(value), name))
            held = next((holder[name] for holder in holders if name in holder), None)
            function = held.fget if isinstance(held, property) else held
            if isinstance(function, types.FunctionType) and not isinstance(value, types.ModuleType):
                self._function(function, depth - 1)
                self._attributes(value, _names_of(function.__code__), depth - 1)
            else:
                self._visit(held, names, depth - 1)


def _same(left: Any, right: Any) -> bool:
    return left is right or (type(left) is type(right) and type(left) in _BY_VALUE and left == right)


def _names_of(code: types.CodeType) -> set[str]:
    """Names of globals and attributes that a function has a word for, also in functions defined inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names_of, inner))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _holders(value: Any) -> list[Mapping[str, Any]]:
    """Where the attributes of an object, a class or a module of Python are looked up."""
    kinds = value.__mro__ if isinstance(value, type) else type(value).__mro__
    return [getattr(value, "__dict__", {}), *(vars(kind) for kind in kinds if not _foreign(kind))]


def _of_numpy(value: Any) -> Any:
    """The numbers of an array or a scalar, the state of a generator."""
    if hasattr(value, "tobytes"):
        return value.tobytes() if value.size <= _LARGEST else value
    return repr(value.bit_generator.state) if hasattr(value, "bit_generator") else value


def _foreign(value: Any) -> bool:
    """Of a library, which looks at no setting of a training run."""
    if isinstance(value, types.SimpleNamespace) or type(value).__name__ == "Namespace":
        return False
    kind = value if isinstance(value, (type, types.FunctionType)) else type(value)
    name = value.__name__ if isinstance(value, types.ModuleType) else kind.__module__
    return name.partition(".")[0] in FOREIGN
