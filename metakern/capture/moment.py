"""What a pass may leave to the next one, at one moment.

Between the forward and the backward pass of a batch another batch may pass. The graph of the first must find what it
has saved, and layers that run again in the backward pass what they read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from metakern.capture.attributes import Attributes
from metakern.capture.buffers import Buffers
from metakern.capture.snapshot import Snapshot


class Left:
    """Attributes of modules, and tensors outside of the model; `restore` puts back both, and versions with them."""

    def __init__(self, attributes: Attributes, tensors: Iterable[Tensor]) -> None:
        self._attributes, self._tensors = attributes, [Snapshot(tensor) for tensor in tensors]

    def restore(self) -> None:
        self._attributes.restore()
        for tensor in self._tensors:
            tensor.restore()


class Moment(Left):
    """The same, and buffers."""

    def __init__(self, model: nn.Module, outside: Sequence[Tensor]) -> None:
        super().__init__(Attributes(model), outside)
        self._of, self._buffers = (model, outside), Buffers(model)

    def restore(self) -> None:
        self._buffers.restore()
        super().restore()

    def exchange(self) -> Left:
        """Restore, and return what was there instead, buffers aside."""
        left = Left(self._attributes.exchange(), [kept.tensor for kept in self._tensors])
        for kept in self._tensors:
            kept.restore()
        self._buffers.restore()
        return left

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside the block all is as it was then, afterwards as before the block."""
        now = Moment(*self._of)
        self.restore()
        try:
            yield
        finally:
            now.restore()
