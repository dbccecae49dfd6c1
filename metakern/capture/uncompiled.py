"""What `torch.compile` compiled runs as it was written, inside metakern's passes.

A compiled module or function would hide from tracing where parameters are used, loses the tangents of forward mode
without a word, and cannot be differentiated twice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_stances: list[Any] = []
"""Of the outermost block, what ends it; blocks may end in another order than they began, where generators hold them."""
_blocks = 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block nothing compiled runs compiled; torch's compiler is not imported for that."""
    global _blocks
    if not _stances and "torch._dynamo" in sys.modules:
        stance = torch.compiler.set_stance("force_eager")
        stance.__enter__()
        _stances.append(stance)
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        if _blocks == 0 and _stances:
            _stances.pop().__exit__(None, None, None)
