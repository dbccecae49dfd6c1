"""Everything a forward pass may change, so that a failed call leaves no trace and extra passes do not count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from metakern.capture.members import parameters_of
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.attributes import Attributes
from metakern.capture.state.buffers import Buffers
from metakern.capture.state.function_state import FunctionState
from metakern.capture.state.random_state import random_state, restore_random_state
from metakern.capture.state.registration import nothing_registered
from metakern.capture.state.uncompiled import uncompiled
from metakern.capture.state.writes import Writes, nothing_written


class PythonState:
    """Attributes of modules, and the state of the loss function and of the model's functions, at one moment."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, deep: bool = False) -> None:
        self._attributes, self.functions = Attributes(model, deep=deep), FunctionState(model, loss_fn, deep=deep)

    def restore(self) -> None:
        self._attributes.restore()
        self.functions.restore()


class PassState:
    """The state that a forward pass starts from, so that the pass can be repeated without leaving a trace."""

    def __init__(
        self, model: nn.Module, loss_fn: Any = None, writes: Writes | None = None, *, deep: bool = False
    ) -> None:
        self._writes = writes  # what the pass writes into parameters
        self._model, self._loss_fn, self._deep = model, loss_fn, deep
        self._buffers, self._held, self._random = Buffers(model), PythonState(model, loss_fn, deep=deep), random_state()
        if writes is not None and writes.functions is None:
            writes.functions = self._held.functions

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside the block all is as at that start, random generators included; afterwards as before the block."""
        now, after = PythonState(self._model, self._loss_fn, deep=self._deep), random_state()
        self._held.restore()
        restore_random_state(self._random)
        try:
            with ExitStack() as stack:
                stack.enter_context(self._buffers.replayed())
                if self._writes is not None:
                    stack.enter_context(self._writes.rewound())
                    stack.enter_context(self._writes.uncounted())
                stack.enter_context(nothing_written(self._model))
                yield
        finally:
            now.restore()
            restore_random_state(after)


class RestorePoint:
    """The state that a failed attempt is reset to: buffers, attributes and random state of a model at one moment, and
    what `writes` has kept since (parameters before they were overwritten, and the state of functions).
    """

    def __init__(self, model: nn.Module, writes: Writes | None) -> None:
        self._writes = writes
        self._buffers, self._attributes, self._random = Buffers(model), Attributes(model), random_state()
        self.parameters = parameters_of(model)

    def restore(self) -> None:
        if self._writes is not None:
            self._writes.undo()
            self._writes.meta_changes = None
        self._buffers.restore()
        self._attributes.restore()
        if self._writes is not None and self._writes.functions is not None:
            self._writes.functions.restore()
        restore_random_state(self._random)


_ONCE = "any region computed under selective activation checkpoint"
"""In what torch says of a second backward pass."""


@contextmanager
def unchanged_on_error(model: nn.Module, writes: Writes | None = None) -> Iterator[RestorePoint]:
    """Restore the model if an exception leaves the block; the block may also call `restore` itself.

    Inside the block, compiled parts of the model run uncompiled, and no weight is taken from a cache.

    Raises:
        ValueError: the block gives the model a new trainable parameter.
        EngineUnavailable: a layer allows one backward pass only, whatever the engine.
    """
    start = RestorePoint(model, writes)
    grads = [p.grad for p in start.parameters]
    try:
        with uncompiled(), nothing_registered(model, start.parameters), _computed_anew(), _modes_as_before():
            yield start
            if writes is not None:
                writes.settle()
    except BaseException as error:
        start.restore()
        for p, grad in zip(start.parameters, grads):
            p.grad = grad
        if isinstance(error, RuntimeError) and _ONCE in str(error):
            raise EngineUnavailable(
                "selective activation checkpointing allows one backward pass over a layer, and a step needs several; "
                "leave out context_fn of torch.utils.checkpoint"
            ) from error
        raise


@contextmanager
def _computed_anew() -> Iterator[None]:
    """Clear what torch keeps of weights, before and after: autocast's cast ones, which it keeps until the outermost
    autocast block ends, and those of `parametrize.cached()`, which are not used inside either, since the passes of
    both batches would share a graph. A second step in that block, or code after it, would use the weights from before
    the optimizer's step.
    """
    enabled = parametrize._cache_enabled
    _forget_weights()
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled
        _forget_weights()


@contextmanager
def _modes_as_before() -> Iterator[None]:
    """Take off torch's stack what an interrupt (ctrl-C) between a mode's `__enter__` and its block left there."""
    depth = torch._C._len_torch_function_stack()
    try:
        yield
    finally:
        while torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()


def _forget_weights() -> None:
    torch.clear_autocast_cache()
    parametrize._cache.clear()
