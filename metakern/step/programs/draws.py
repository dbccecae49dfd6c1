"""Random numbers in a program: if a generator was rewound, the pass gets the numbers that it drew before.

A dual pass and checkpointed layers repeat a pass from the generator state that it began with, so that their dropout
masks are the same. A program cannot rewind a generator; there the first numbers are reused.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._python_dispatch import TorchDispatchMode

from metakern.capture.state.random_state import RandomState, restore_random_state, same_torch_state, torch_random_state

_aten = torch.ops.aten
_MASKED = _aten.native_dropout.default
_OF_SHAPE = frozenset(
    (
        _aten.bernoulli.p,
        _aten.bernoulli_.float,
        _aten.uniform_.default,
        _aten.normal_.default,
        _aten.exponential_.default,
        _aten.rand.default,
        _aten.rand_like.default,
        _aten.randn.default,
        _aten.randn_like.default,
        _aten.randint_like.default,
        _aten.randint_like.low_dtype,
        _aten.randperm.default,
        _MASKED,
    )
)
"""What these draw does not depend on the values of their arguments; others draw new numbers."""


class Draws(TorchDispatchMode):
    """While a program is traced, repeated draws from the same generator state return the first result."""

    def __init__(self) -> None:
        super().__init__()
        self._met: list[tuple[Hashable, RandomState, Tensor, RandomState]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _OF_SHAPE or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        call, before = _call(func, args, kwargs), _state()
        for known, state, drawn, after in self._met:
            if known == call and _same(state, before):
                restore_random_state(after)
                return _with(func, args, kwargs, drawn)
        output = func(*args, **kwargs)
        drawn = output[1] if func is _MASKED else output
        self._met.append((call, before, drawn.clone(), _state()))
        return output


def _with(func: Any, args: Any, kwargs: Any, drawn: Tensor) -> Any:
    """What the call would return if it drew these numbers."""
    if func is _MASKED:
        x, p, _ = args
        return x * drawn * (1 / (1 - p) if p < 1 else 0.0), drawn.clone()
    if func._schema.is_mutable:
        return args[0].copy_(drawn)
    return drawn.clone()


def _call(func: Any, args: Any, kwargs: Any) -> Hashable:
    """Everything but the generator that determines what is drawn."""

    def known(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.stride(), value.dtype, value.device
        return tuple(value) if isinstance(value, list) else value

    return func, tuple(map(known, args)), tuple((key, known(value)) for key, value in kwargs.items())


def _state() -> RandomState:
    with disable_proxy_modes_tracing():
        return torch_random_state()


def _same(left: RandomState, right: RandomState) -> bool:
    with disable_proxy_modes_tracing():
        return same_torch_state(left, right)
