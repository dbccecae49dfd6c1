"""Inside metakern's passes, code compiled by `torch.compile` runs uncompiled.

A compiled module or function hides its uses of parameters from tracing, silently loses the tangents of forward mode,
and cannot be differentiated twice.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_stances: list[Any] = []
"""The open stance, which the last block to end closes: torch has one stance for all threads, and blocks of two threads
may end in any order."""
_blocks = 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block compiled code runs uncompiled, in every thread. Does not import torch's compiler."""
    global _blocks
    with _lock:
        if not _stances and "torch._dynamo" in sys.modules:
            _stances.append(torch.compiler.set_stance("force_eager"))
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0 and _stances:
                _stances.pop().__exit__(None, None, None)
