"""Whether a call can be replayed with the same random numbers; layer rules that replay calls need that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metakern.capture.function import Function
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.random_state import RandomState, same_state, torch_random_state

RECURRENT = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))
"""Whole recurrent layers, which cuDNN computes where it can."""
_NAMES = frozenset(function.__name__ for function in RECURRENT)


def watching_randomness(func: Any, function: Function, args: Any, kwargs: Any) -> tuple[Any, RandomState | None]:
    """The output of a call, and the random state before it if it drew numbers, so that a replay draws the same."""
    if function.deterministic:
        return func(*args, **kwargs), None
    before = torch_random_state()
    output = func(*args, **kwargs)
    return output, None if same_state(before, torch_random_state()) else before


def require_repeatable(name: str, args: tuple[Any, ...], data: Tensor, drew: bool) -> None:
    """Raise for calls on a GPU whose random numbers cannot be drawn again; `drew`: the generators' state changed.

    Raises: EngineUnavailable
    """
    if not data.is_cuda:
        return
    if drew and name == "scaled_dot_product_attention":
        raise EngineUnavailable(
            "attention with dropout takes a parameter (a learned bias or query), and a fused kernel's mask cannot "
            "be drawn again; set its dropout to 0, or use engine='jvp'"
        )
    if name in _NAMES and _dropout(args) and torch.backends.cudnn.is_acceptable(data):
        raise EngineUnavailable(
            f"{name} has dropout between its layers, whose masks cuDNN draws from a generator of its own, so that they "
            "cannot be drawn again; set its dropout to 0, or torch.backends.cudnn.enabled = False"
        )


def _dropout(args: tuple[Any, ...]) -> float:
    """Dropout of a recurrent call, 0 if not training: the argument after the weights, has_biases and num_layers."""
    weights = next((place for place, value in enumerate(args) if isinstance(value, list)), len(args))
    dropout, training = (*args[weights + 3 : weights + 5], 0.0, False)[:2]
    return dropout if training else 0.0
