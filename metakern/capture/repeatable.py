"""Calls that are replayed with the same random numbers; layer rules that replay calls need that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakern.capture.function import Function
from metakern.capture.members import modules_of
from metakern.capture.state.random_state import RandomState, same_state, torch_random_state
from metakern.capture.unrolled import LastingMode

RECURRENT = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))
"""Whole recurrent layers, which cuDNN computes where it can."""
_NAMES = frozenset(function.__name__ for function in RECURRENT)


def watching_randomness(func: Any, function: Function, args: Any, kwargs: Any) -> tuple[Any, RandomState | None]:
    """The output of a call, and the random state before it if it drew numbers, so that a replay draws the same."""
    if function.deterministic:
        return func(*args, **kwargs), None
    before = torch_random_state()
    output = repeatable(func, function.name, args, kwargs)
    return output, None if same_state(before, torch_random_state()) else before


def repeatable(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The output of a call of the function `name`, whose masks other forms of it can draw again."""
    with drawn_alike() if _draws_apart(name, args, kwargs) else nullcontext():
        return func(*args, **kwargs)


@contextmanager
def drawn_alike() -> Iterator[None]:
    """Inside the block, equal states of torch's generators give equal masks to every form of a call: attention and
    recurrent layers with dropout run as compositions of other functions. A fused kernel numbers the entries of its mask
    in its own way, and cuDNN has a generator of its own.
    """
    with sdpa_kernel(SDPBackend.MATH), without_cudnn():
        yield


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Inside the block, cuDNN is not used. (Its `flags` would set TF32 as well.)"""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def repeatable_layers(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside the block, recurrent layers with dropout draw masks that a later pass can draw again, in traced passes or
    not.
    """
    recurrent = [module for module in modules_of(model) if isinstance(module, nn.RNNBase)]
    drawing = any(module.dropout > 0 and module.training for module in recurrent)
    return _RepeatableLayers() if drawing else nullcontext()


class _RepeatableLayers(LastingMode):
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return repeatable(func, func.__name__, args, kwargs) if func in RECURRENT else func(*args, **kwargs)


def _draws_apart(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call may draw masks on a GPU that no other form of it can draw."""
    if name == "scaled_dot_product_attention":
        first, dropout = args[0] if args else kwargs["query"], args[4] if len(args) > 4 else kwargs.get("dropout_p", 0)
    elif name in _NAMES:
        first, dropout = args[0], _dropout(args)
    else:
        return False
    return first.is_cuda and dropout > 0


def _dropout(args: tuple[Any, ...]) -> float:
    """Dropout of a recurrent call, 0 if not training: the argument after the weights, has_biases and num_layers."""
    weights = next((place for place, value in enumerate(args) if isinstance(value, list)), len(args))
    dropout, training = (*args[weights + 3 : weights + 5], 0.0, False)[:2]
    return dropout if training else 0.0
