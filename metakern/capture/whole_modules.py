"""Modules that are traced as one call because the user registered them: their inside need not be seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from metakern.capture.members import modules_of
from metakern.capture.module_call import ModuleCall
from metakern.capture.state.random_state import random_state
from metakern.capture.trace import Tracer

REGISTERED: set[type[nn.Module]] = set()
"""Module types that are traced as one call; `metakern.register_layer` adds to it."""


@contextmanager
def registered_modules_as_wholes(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Inside the block, `tracer` records the calls of registered modules, and nothing inside them."""
    if not REGISTERED:
        yield
        return
    opened: list[tuple[ModuleCall, Any] | None] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        opened.append(None if tracer.paused else (ModuleCall(module), random_state()))
        tracer.paused = True

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        outermost = opened.pop()
        if outermost is None:
            return output
        tracer.paused = False
        return tracer.note_module(outermost[0], args, kwargs, output, outermost[1])

    handles = []
    try:
        for module in modules_of(model):
            if isinstance(module, tuple(REGISTERED)):
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
