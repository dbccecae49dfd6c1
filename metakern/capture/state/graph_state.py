"""What one pass leaves for the next: attributes of modules, tensors and buffers, at one moment.

The meta batch's pass runs between the forward and the backward pass of the training batch. The training graph must
then find the values that it has saved, and checkpointed layers those that they read: attributes of modules, and the
contents of tensors. Collections and other objects are left alone, since neither depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from metakern.capture.members import OWN, is_torchs_own, keepers_of, tensors_held_by
from metakern.capture.state.attributes import Namespace
from metakern.capture.state.buffers import Buffers
from metakern.capture.state.snapshot import Snapshot

_NONE = object()


class _Attribute(NamedTuple):
    module: nn.Module
    name: str
    was: Any
    became: Any


class Changes:
    """What a pass has changed: attributes of modules, and tensors, each as before and after it."""

    def __init__(self, attributes: Sequence[_Attribute], tensors: Sequence[tuple[Snapshot, Snapshot]]) -> None:
        self._attributes, self._tensors = attributes, tensors

    def reapply(self) -> None:
        """Make these changes again, except where something else has changed since."""
        for module, name, was, became in self._attributes:
            if vars(module).get(name, _NONE) is was:
                _bind(module, name, became)
        for before, after in self._tensors:
            if not before.changed():
                after.restore()


class GraphState:
    """Attributes of modules, tensors among them or found `outside` the model, and buffers, at one moment."""

    def __init__(self, model: nn.Module, outside: Sequence[Tensor]) -> None:
        self._of = model, outside
        self._bound = [Namespace(module, vars(module).copy()) for module in keepers_of(model)]
        own = (tensors_held_by(module) for module, _ in self._bound if not is_torchs_own(type(module)))
        found = {id(tensor): tensor for tensors in (*own, outside) for tensor in tensors}
        self._tensors, self._buffers = [Snapshot(tensor) for tensor in found.values()], Buffers(model)

    def restore(self) -> None:
        for module, name, was, _ in self._changed():
            _bind(module, name, was)
        for tensor in self._tensors:
            tensor.restore()
        self._buffers.restore()

    def take_back(self) -> Changes:
        """Restore this moment, and return what had changed since, except buffers."""
        tensors = [(kept, Snapshot(kept.tensor)) for kept in self._tensors if kept.changed()]
        left = Changes(self._changed(), tensors)
        self.restore()
        return left

    @contextmanager
    def reinstated(self) -> Iterator[None]:
        """Inside the block all is as it was at this moment; afterwards as before the block."""
        now = GraphState(*self._of)
        self.restore()
        try:
            yield
        finally:
            now.restore()

    def _changed(self) -> list[_Attribute]:
        found = []
        for module, held in [bound for bound in self._bound if not bound.unchanged()]:
            now = vars(module)
            names = [name for name in {**held, **now} if name not in OWN or name == "training"]
            pairs = [(name, held.get(name, _NONE), now.get(name, _NONE)) for name in names]
            found += [_Attribute(module, *each) for each in pairs if each[1] is not each[2]]
        return found


def _bind(module: nn.Module, name: str, value: Any) -> None:
    if value is _NONE:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value
