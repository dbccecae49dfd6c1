"""Everything a forward pass may change, so that a failed call leaves no trace and extra passes do not count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from metakern.capture.random_state import random_state, restore_random_state


class _Buffer(NamedTuple):
    module: nn.Module
    name: str
    tensor: Tensor
    version: int
    value: Tensor


class Buffers:
    """The buffers of a model at one moment: which tensors they are, and what they hold."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            _Buffer(module, name, buffer, buffer._version, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        """Put back whatever has changed since, by value and by identity."""
        for kept in self._kept:
            kept.module._buffers[kept.name] = kept.tensor
            # batch_norm writes its running statistics without raising their version, so in training mode versions
            # say nothing. `.data` leaves the version alone: a graph that saved the buffer holds these same values.
            if kept.module.training or kept.tensor._version != kept.version:
                kept.tensor.data.copy_(kept.value)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside the block the model has fresh copies of the buffers as they were kept, and its own afterwards."""
        now = [kept.module._buffers[kept.name] for kept in self._kept]
        try:
            for kept in self._kept:
                kept.module._buffers[kept.name] = kept.value.clone()
            yield
        finally:
            for kept, buffer in zip(self._kept, now):
                kept.module._buffers[kept.name] = buffer


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Buffers, random state and gradients are as before if an exception leaves the block."""
    buffers, state = Buffers(model), random_state()
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        buffers.restore()
        restore_random_state(state)
        for parameter, grad in grads:
            parameter.grad = grad
        raise


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """A forward pass that does not count: running statistics are as before afterwards."""
    buffers = Buffers(model)
    try:
        yield
    finally:
        buffers.restore()
