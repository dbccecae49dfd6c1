"""The buffers of a model at one moment: which tensors they are, and what these hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from metakern.capture.members import keepers_of
from metakern.capture.state.snapshot import Snapshot

_Named = tuple[dict[str, Tensor | None], dict[str, Tensor | None]]
"""The buffer dict of a module, and a copy of it."""


class Buffers:
    """The buffers of a model, its unregistered modules included, at one moment: which tensors, and what they hold."""

    def __init__(self, model: nn.Module) -> None:
        self._named, self._kept = list[_Named](), list[Snapshot]()
        for module in keepers_of(model):
            named = module._buffers.copy()
            self._named.append((module._buffers, named))
            for buffer in named.values():
                if buffer is not None and _can_be_written(buffer):
                    self._kept.append(Snapshot(buffer))

    def restore(self) -> None:
        """Put back whatever has changed since, by value, by identity and by name."""
        for buffers, named in self._named:
            if buffers or named:
                _refill(buffers, named)
        for kept in self._kept:
            kept.restore()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside the block the model works on copies of the kept buffers; afterwards it has its own again."""
        now = [buffers.copy() for buffers, _ in self._named]
        fresh = {id(kept.tensor): kept.copy() for kept in self._kept}  # shared buffers stay shared
        try:
            for buffers, named in self._named:
                if buffers or named:
                    _refill(buffers, {name: fresh.get(id(buffer), buffer) for name, buffer in named.items()})
            yield
        finally:
            for (buffers, _), after in zip(self._named, now):
                if buffers or after:
                    _refill(buffers, after)


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """For a forward pass that must not count: buffers such as running statistics are restored after the block."""
    buffers = Buffers(model)
    try:
        yield
    finally:
        buffers.restore()


def _can_be_written(buffer: Tensor) -> bool:
    """torch refuses to write into inference tensors, and into tensors whose entries overlap in memory."""
    expanded = buffer.layout == torch.strided and 0 in buffer.stride()
    overlap = torch._debug_has_internal_overlap  # pyright: ignore[reportPrivateImportUsage]
    return not (buffer.is_inference() or (expanded and overlap(buffer) == 1))


def _refill(buffers: dict[str, Tensor | None], named: dict[str, Tensor | None]) -> None:
    buffers.clear()
    buffers.update(named)
