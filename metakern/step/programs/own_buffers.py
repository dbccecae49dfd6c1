"""The buffers that a compiled step writes: it runs on copies, whose final values are results like any other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from metakern.capture.members import keepers_of


def buffers_of(model: nn.Module) -> list[Tensor]:
    """Buffers, also of modules that are not registered; one that two modules hold is listed once."""
    entries = (b for module in keepers_of(model) for b in module._buffers.values() if b is not None)
    return list({id(b): b for b in entries}.values())


class OwnBuffers:
    """Some of a model's buffers, such as its running statistics."""

    def __init__(self, model: nn.Module, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        place = {id(tensor): place for place, tensor in enumerate(tensors)}
        self._named = [
            (module._buffers, name, place[id(buffer)])
            for module in keepers_of(model)
            for name, buffer in module._buffers.items()
            if id(buffer) in place
        ]

    @contextmanager
    def copied(self, values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Inside the block, the model has copies of `values` instead of its buffers; yields the copies."""
        copies = [value.clone() for value in values]
        self._put(copies)
        try:
            yield copies
        finally:
            self._put(self.tensors)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for buffers, name, place in self._named:
            buffers[name] = tensors[place]

    def take(self, values: Sequence[Tensor]) -> None:
        """Write into the buffers what a step left in its copies."""
        with torch.no_grad():
            for buffer, value in zip(self.tensors, values, strict=True):
                buffer.copy_(value)
