"""State that functions keep between calls, outside the model: memory banks, running centres, counters, generators.

A loss function may be a closure, a method of a trainer, a callable object or a module with buffers of its own, and it
may use global names. Whatever it can reach in a few steps is inspected, never called.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from metakern.capture.members import modules_of
from metakern.capture.state.contents import (
    LARGEST_ARRAY,
    LARGEST_LIST,
    PutBack,
    attributes_kept,
    attributes_of,
    content_of,
    inside,
    is_module_of_user,
    is_of_user,
    many_plain,
    size_of,
)

_DEPTH, _DEEP = 4, 10
"""Depth of the search: in every step, and before passes with NaN, which must not stay behind in any list."""

_FEW = 256
"""At most this many tensors are put aside and brought back around the meta batch's pass; further ones are data."""

_ONE_BY_ONE = 256
"""Up to this size, what a collection holds is looked at one by one."""

_FUNCTIONS = frozenset((types.FunctionType, types.MethodType, functools.partial))
_OPAQUE = (types.ModuleType, str, bytes, int, float, complex, bool, type(None))
FOREIGN = sys.stdlib_module_names | {"torch", "numpy"}
"""Packages whose objects keep no state that a pass changes: loggers, locks, data loaders, optimizers."""


class FunctionState:
    """What functions can reach at one moment: the objects that names refer to, and their contents.

    The modules of `model` are kept in `attributes.py`, what their functions and hooks reach is kept here. `deep`:
    search further, and also large collections for collections, such as a history of every example of a data set.
    """

    def __init__(self, model: nn.Module, *functions: Any, deep: bool = False) -> None:
        self._deep = deep
        self._seen: dict[int, Any] = {id(module): module for module in modules_of(model)}
        self._put_back: list[PutBack] = []
        self.tensors: list[Tensor] = []
        for function in (*functions, *_own_functions(model)):
            self._visit(function, _DEEP if deep else _DEPTH)

    def restore(self) -> None:
        for put_back in self._put_back:
            put_back()

    def _visit(self, value: Any, depth: int) -> None:
        if depth == 0 or isinstance(value, _OPAQUE) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, types.MethodType):
            self._visit_all((value.__func__, value.__self__), depth)
        elif isinstance(value, functools.partial):
            self._visit_all((value.func, *value.args, *value.keywords.values(), vars(value)), depth)
        elif isinstance(value, nn.Module):
            for module in modules_of(value):
                if module is value or id(module) not in self._seen:
                    self._seen[id(module)] = module
                    self._visit_all((vars(module), type(module), _called(module)), 3)
        elif not isinstance(value, Tensor) or value.numel() <= LARGEST_ARRAY:
            self._held(value, depth)

    def _visit_all(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            self._visit(value, depth)

    def _held(self, value: Any, depth: int) -> None:
        """What collections, objects and classes hold."""
        kind, size, put_back = type(value), size_of(value), content_of(value)
        if size > LARGEST_ARRAY or (put_back is None and isinstance(value, (list, dict, set, deque))):
            return
        held = self._inside(value, size)
        if isinstance(value, type):  # which of its functions are called is not known
            held = [each for each in held if not isinstance(each, types.FunctionType)]
        elif is_of_user(kind):
            self._visit(_called(value), depth)
        elif _keeps_state(kind):  # an installed library's
            self._put_back.append(attributes_kept(value))
            held += attributes_of(value).values()
        if put_back is not None:
            self._put_back.append(put_back)
            if isinstance(value, Tensor) and len(self.tensors) < _FEW:
                self.tensors.append(value)
        if len(held) > _ONE_BY_ONE and depth > 1:
            logs, held = many_plain(held)
            self._put_back.append(logs)
        self._visit_all(held, depth - 1)

    def _inside(self, value: Any, size: int) -> list[Any]:
        if size <= LARGEST_LIST:
            return inside(value)
        return [each for each in inside(value) if isinstance(each, (list, dict, set, deque))] if self._deep else []

    def _function(self, function: types.FunctionType, depth: int) -> None:
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self._visit_all((vars(function), *defaults), depth - 1)
        for cell, content in filled_cells(function):
            self._put_back.append(functools.partial(_refill_cell, cell, content))
            self._visit(content, depth - 1)
        # Not `__module__`, which wrappers copy: torch's compiler keeps its stance among the globals of its wrapper.
        if str(function.__globals__.get("__name__")).partition(".")[0] not in FOREIGN:
            self._named(globals_of(function.__code__), function.__globals__, function, depth - 1)

    def _named(self, names: Iterable[str], held: dict[str, Any], function: types.FunctionType, depth: int) -> None:
        """Visit what a function's names refer to, among its globals and in the user's modules found there."""
        for name in names:
            if name in held:
                value = held[name]
                self._put_back.append(functools.partial(_rebind, held, name, value))
                if isinstance(value, types.ModuleType) and depth and is_module_of_user(value.__name__):
                    self._named(function.__code__.co_names, vars(value), function, depth - 1)
                # What functions of another file reach is not followed: it would lead through whole libraries.
                elif not isinstance(value, types.FunctionType) or value.__module__ == function.__module__:
                    self._visit(value, depth)


def _called(value: Any) -> Any:
    """The function that runs when an object is called."""
    return getattr(type(value), "forward" if isinstance(value, nn.Module) else "__call__", None)


def _keeps_state(kind: type) -> bool:
    """Whether objects of this class have attributes, and it does not come from a package in `FOREIGN`."""
    return bool(kind.__dictoffset__) and kind.__module__.partition(".")[0] not in FOREIGN


def _own_functions(model: nn.Module) -> Iterator[Any]:
    """Functions that a forward pass may call: its classes' own, those held as attributes, and hooks."""
    yield from module_hooks._global_forward_hooks.values()
    yield from module_hooks._global_forward_pre_hooks.values()
    for module in modules_of(model):
        if not type(module).__module__.startswith("torch."):
            yield type(module).forward
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                yield from hooks.values()
        yield from [value for value in vars(module).values() if type(value) in _FUNCTIONS]


@functools.lru_cache(4096)
def globals_of(code: types.CodeType) -> frozenset[str]:
    """Global names that a function reads or writes, also in functions defined inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    own = (step.argval for step in dis.get_instructions(code) if step.opname.endswith(("_GLOBAL", "_NAME")))
    return frozenset(own).union(*map(globals_of, inner))


def filled_cells(function: types.FunctionType) -> Iterator[tuple[types.CellType, Any]]:
    """The variables that a function has from the functions around it, as far as they are assigned yet."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield cell, cell.cell_contents


def _refill_cell(cell: types.CellType, content: Any) -> None:
    cell.cell_contents = content


def _rebind(names: dict[str, Any], name: str, value: Any) -> None:
    if names.get(name) is not value:
        names[name] = value
