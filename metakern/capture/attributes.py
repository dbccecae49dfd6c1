"""What modules hold beside parameters and buffers: running values, caches, lists, generators of their own."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module()))


class _Kept(NamedTuple):
    module: nn.Module
    attributes: dict[str, Any]
    contents: list[Callable[[], None]]  # each puts back what one attribute held


class Attributes:
    """The attributes of every module of a model at one moment: which objects they are, and what these hold."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = []
        for module in model.modules():
            attributes = {name: value for name, value in vars(module).items() if name not in _OWN}
            contents = [put_back for value in attributes.values() if (put_back := _content(value)) is not None]
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


def _content(value: Any) -> Callable[[], None] | None:
    """A function that puts back what `value` holds now; None for what cannot change or is not looked into."""
    if isinstance(value, Tensor):
        return None if value.grad_fn is not None or value.is_inference() else _tensor(value)
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return partial(_call, value.set_state, state)
    if isinstance(value, random.Random):
        drawn = value.getstate()
        return partial(_call, value.setstate, drawn)
    if isinstance(value, (list, deque)):
        items = list(value)
        return partial(_refill, value, items)
    if isinstance(value, (dict, set)):
        copy = value.copy()
        return partial(_update, value, copy)
    if hasattr(value, "bit_generator"):  # numpy.random.Generator
        numbers = value.bit_generator.state
        return partial(setattr, value.bit_generator, "state", numbers)
    return None


def _tensor(value: Tensor) -> Callable[[], None]:
    held = value.detach().clone()
    return partial(_call, value.data.copy_, held)


def _call(function: Callable[[Any], Any], value: Any) -> None:
    function(value)


def _refill(value: list[Any] | deque[Any], items: list[Any]) -> None:
    if len(value) != len(items) or any(a is not b for a, b in zip(value, items)):
        value.clear()
        value.extend(items)


def _update(value: Any, copy: Any) -> None:
    value.clear()
    value.update(copy)
