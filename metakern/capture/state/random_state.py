"""The random generators that a forward pass may draw from: torch's, Python's and NumPy's global ones."""

from __future__ import annotations

import random
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakern.ops.waiting import capturing


class RandomState(NamedTuple):
    """States of generators; None is not restored (no CUDA, or only torch's generators were asked for)."""

    cpu: Tensor
    cuda: list[Tensor] | None
    python: Any = None
    numpy: Any = None


def torch_random_state() -> RandomState:
    """The state of torch's default generators; none of CUDA's while a graph is captured."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() and not capturing() else None
    return RandomState(torch.get_rng_state(), cuda)


def random_state() -> RandomState:
    """The state of every default generator that a forward pass may draw from."""
    numpy = sys.modules.get("numpy")
    return torch_random_state()._replace(
        python=random.getstate(), numpy=None if numpy is None else numpy.random.get_state()
    )


def restore_random_state(state: RandomState) -> None:
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state_all(state.cuda)
    if state.python is not None:
        random.setstate(state.python)
    if state.numpy is not None:
        sys.modules["numpy"].random.set_state(state.numpy)


def same_state(left: RandomState, right: RandomState) -> bool:
    """Whether nothing was drawn between the two."""
    return same_torch_state(left, right) and same_elsewhere(left, right)


def same_torch_state(left: RandomState, right: RandomState) -> bool:
    """Whether nothing was drawn from torch's default generators."""
    return torch.equal(left.cpu, right.cpu) and all(
        torch.equal(a, b) for a, b in zip(left.cuda or [], right.cuda or [])
    )


def same_elsewhere(left: RandomState, right: RandomState) -> bool:
    """Whether nothing was drawn from Python's and NumPy's generators."""
    if left.python != right.python:
        return False
    one, other = left.numpy, right.numpy  # [1] is a block of numbers, [2] the place in it
    return one is None or other is None or (one[2] == other[2] and bool((one[1] == other[1]).all()))
