"""Everything a forward pass may change, so that a failed call leaves no trace and extra passes do not count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from metakern.capture.members import parameters_of
from metakern.capture.state.attributes import Attributes
from metakern.capture.state.buffers import Buffers
from metakern.capture.state.random_state import random_state, restore_random_state
from metakern.capture.state.registration import nothing_registered
from metakern.capture.state.surroundings import Surroundings
from metakern.capture.state.uncompiled import uncompiled
from metakern.capture.state.writes import Writes, nothing_written


class Held:
    """What modules hold beside parameters and buffers, and what functions hold, at one moment."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, deep: bool = False) -> None:
        self._attributes, self.around = Attributes(model, deep=deep), Surroundings(model, loss_fn, deep=deep)

    def restore(self) -> None:
        self._attributes.restore()
        self.around.restore()


class PassState:
    """What a forward pass starts from: the same pass can be run once more from it, and that run does not count."""

    def __init__(
        self, model: nn.Module, loss_fn: Any = None, writes: Writes | None = None, *, deep: bool = False
    ) -> None:
        self._writes = writes  # what the pass writes into parameters
        self._model, self._loss_fn, self._deep = model, loss_fn, deep
        self._buffers, self._held, self._random = Buffers(model), Held(model, loss_fn, deep=deep), random_state()
        if writes is not None and writes.around is None:
            writes.around = self._held.around

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside the block all is as it was then, random numbers included; afterwards as it was before the block."""
        now, after = Held(self._model, self._loss_fn, deep=self._deep), random_state()
        self._held.restore()
        restore_random_state(self._random)
        try:
            with ExitStack() as stack:
                stack.enter_context(self._buffers.replayed())
                if self._writes is not None:
                    stack.enter_context(self._writes.rewound())
                    stack.enter_context(self._writes.aside())
                stack.enter_context(nothing_written(self._model))
                yield
        finally:
            now.restore()
            restore_random_state(after)


class Start:
    """What a failed attempt goes back to: buffers, attributes and random state of a model at one moment, parameters
    that `writes` has seen overwritten since, and what functions hold around which it has looked.
    """

    def __init__(self, model: nn.Module, writes: Writes | None) -> None:
        self._writes = writes
        self._buffers, self._attributes, self._random = Buffers(model), Attributes(model), random_state()
        self.parameters = parameters_of(model)

    def restore(self) -> None:
        if self._writes is not None:
            self._writes.undo()
            self._writes.left = None
        self._buffers.restore()
        self._attributes.restore()
        if self._writes is not None and self._writes.around is not None:
            self._writes.around.restore()
        restore_random_state(self._random)


@contextmanager
def unchanged_on_error(model: nn.Module, writes: Writes | None = None) -> Iterator[Start]:
    """The model is as before if an exception leaves the block, which may go back to where it started as well.

    What is compiled of the model runs uncompiled in the block, and what autocast has cast is cast anew.

    Raises: ValueError where the block gives the model a new trainable parameter.
    """
    start = Start(model, writes)
    grads = [p.grad for p in start.parameters]
    try:
        with uncompiled(), nothing_registered(model, start.parameters), _cast_anew():
            yield start
            if writes is not None:
                writes.settle()
    except BaseException:
        start.restore()
        for p, grad in zip(start.parameters, grads):
            p.grad = grad
        raise


@contextmanager
def _cast_anew() -> Iterator[None]:
    """Autocast keeps what it has cast of a weight until its outermost block ends: a second step in one block, and what
    comes after it, would take the weights from before the optimizer's step.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
