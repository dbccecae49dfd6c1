"""The random generators that a forward pass may draw from."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.capture.host import host_may_wait

RandomState = tuple[Tensor, list[Tensor] | None]


def random_state() -> RandomState:
    """The state of every default generator a forward pass may draw from; none of CUDA's while a graph is captured."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() and host_may_wait() else None
    return torch.get_rng_state(), cuda


def restore_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])


def same_state(left: RandomState, right: RandomState) -> bool:
    """Has nothing been drawn between the two?"""
    if not torch.equal(left[0], right[0]):
        return False
    return all(torch.equal(a, b) for a, b in zip(left[1] or [], right[1] or []))
