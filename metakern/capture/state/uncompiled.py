"""Inside metakern's passes, code compiled by `torch.compile` runs uncompiled.

A compiled module or function hides its uses of parameters from tracing, silently loses the tangents of forward mode,
and cannot be differentiated twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from metakern.capture.state.process_wide import ProcessWide


def _force_eager() -> Callable[[], object] | None:
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, so there is no need to import the compiler
        return None
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


_STANCE = ProcessWide(_force_eager)
"""torch has one stance for all threads."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block compiled code runs uncompiled, in every thread. Does not import torch's compiler."""
    with _STANCE.changed():
        yield
