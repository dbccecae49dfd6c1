"""Can a call be made again with the random numbers that it drew? Rules that replay a call ask for that."""

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
    """The output of a call, and the random state before it if the call drew from it, so that a replay does alike."""
    if function.deterministic:
        return func(*args, **kwargs), None
    before = torch_random_state()
    output = func(*args, **kwargs)
    return output, None if same_state(before, torch_random_state()) else before


def require_repeatable(name: str, args: tuple[Any, ...], data: Tensor, drew: bool) -> None:
    """Raise for calls on a GPU that draw from elsewhere than the generators; `drew` tells whether those moved.

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
    """Its probability in a recurrent call in training mode: behind the list of weights, their bias and their number."""
    weights = next((place for place, value in enumerate(args) if isinstance(value, list)), len(args))
    dropout, training = (*args[weights + 3 : weights + 5], 0.0, False)[:2]
    return dropout if training else 0.0
