"""Whether the host may wait for a value: not while a CUDA graph is captured, nor while a capture is rehearsed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_rehearsals: list[None] = []  # for all threads: backward passes run hooks in threads of their own


def capturing() -> bool:
    """Whether a CUDA graph is being captured. Nothing runs then, and generators have no state to be read or set."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def host_may_wait() -> bool:
    """False while a CUDA graph is being captured: values do not exist then, and checks of them are left out."""
    return not (_rehearsals or capturing())


@contextmanager
def without_waiting() -> Iterator[None]:
    """Inside the block a step takes the paths that it takes in a capture, but is computed."""
    _rehearsals.append(None)
    try:
        yield
    finally:
        _rehearsals.pop()
