"""What a function keeps between its calls, outside the model: memory banks, running centres, counters, generators.

A loss function may be a closure, a method of a trainer, a callable object or a module with buffers of its own, and it
may use global names. Whatever it can reach in a few steps is looked at, never called.
"""

from __future__ import annotations

import dis
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.attributes import LARGEST_ARRAY, LARGEST_LIST, content_of
from metakern.capture.members import modules_of

_DEPTH = 4

_OPAQUE = (types.ModuleType, type, str, bytes, int, float, complex, bool, type(None))
FOREIGN = sys.stdlib_module_names | {"torch", "numpy"}
"""Where objects come from that keep no state of a training run: loggers, locks, data loaders, optimizers."""


class Surroundings:
    """What functions can reach at one moment: which objects names stand for, and what these hold.

    `model` itself is looked after elsewhere, but not what its own functions and hooks reach.
    """

    def __init__(self, model: nn.Module, *functions: Any) -> None:
        self._seen: dict[int, Any] = {id(module): module for module in modules_of(model)}
        self._put_back: list[Callable[[], None]] = []
        for function in (*functions, *_own_functions(model)):
            self._visit(function, _DEPTH)

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
            self._visit(value.__func__, depth)
            self._visit(value.__self__, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit(part, depth)
        elif isinstance(value, Tensor):
            if value.numel() <= LARGEST_ARRAY:
                self._keep(value)
        elif isinstance(value, (list, dict, set, deque)):
            self._collection(value, depth)
        elif isinstance(value, (torch.Generator, random.Random)) or type(value).__module__.startswith("numpy"):
            self._keep(value)
        elif isinstance(value, nn.Module):
            for module in modules_of(value):
                if module is value or id(module) not in self._seen:
                    self._seen[id(module)] = module
                    self._visit(vars(module), 3)
        elif hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in FOREIGN:
            self._visit(vars(value), depth)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._put_back.append(functools.partial(_refill_cell, cell, content))
            self._visit(content, depth - 1)
        for name in globals_of(function.__code__):
            if name in function.__globals__:
                value = function.__globals__[name]
                self._put_back.append(functools.partial(_rebind, function.__globals__, name, value))
                # What functions of another file reach is not followed: it would lead through whole libraries.
                if not isinstance(value, types.FunctionType) or value.__module__ == function.__module__:
                    self._visit(value, depth - 1)

    def _collection(self, value: Any, depth: int) -> None:
        if len(value) > LARGEST_LIST:
            return
        self._keep(value)
        for item in tuple(value.values() if isinstance(value, dict) else value):
            self._visit(item, depth - 1)

    def _keep(self, value: Any) -> None:
        put_back = content_of(value)
        if put_back is not None:
            self._put_back.append(put_back)


def _own_functions(model: nn.Module) -> Iterator[Any]:
    """Functions that a forward pass may call: its classes' own, those held as attributes, and hooks."""
    for module in modules_of(model):
        if not type(module).__module__.startswith("torch."):
            yield type(module).forward
        yield from module._forward_hooks.values()
        yield from module._forward_pre_hooks.values()
        for value in vars(module).values():
            if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
                yield value


@functools.lru_cache(4096)
def globals_of(code: types.CodeType) -> frozenset[str]:
    """Global names that a function reads or writes, also in functions defined inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    own = (step.argval for step in dis.get_instructions(code) if step.opname.endswith(("_GLOBAL", "_NAME")))
    return frozenset(own).union(*map(globals_of, inner))


def _refill_cell(cell: types.CellType, content: Any) -> None:
    cell.cell_contents = content


def _rebind(names: dict[str, Any], name: str, value: Any) -> None:
    if names.get(name) is not value:
        names[name] = value
