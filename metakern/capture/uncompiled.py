"""What `torch.compile` compiled runs as it was written, inside metakern's passes.

A compiled module or function would hide from tracing where parameters are used, loses the tangents of forward mode
without a word, and cannot be differentiated twice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block nothing compiled runs compiled; torch's compiler is not imported for that."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
