"""What `torch.compile` compiled runs as it was written, inside metakern's passes.

A compiled module or function would hide from tracing where parameters are used, loses the tangents of forward mode
without a word, and cannot be differentiated twice.
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
"""What switches compiling on again, left by the first block for the last one: torch has one stance for all threads, and
blocks of two threads end in any order."""
_blocks = 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block nothing compiled runs compiled, in any thread; torch's compiler is not imported for that."""
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
