"""Buffers of a model that runs part by part, updated as if it had run once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from metakern.capture.layout import stored_alike
from metakern.capture.members import keepers_of, name_of
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.buffers import Buffers

_Place = tuple[nn.Module, str]  # a module and the name of its buffer


class PartBuffers:
    """Every part starts from the original buffers; the result of the parts must be that of one pass over the batch.

    That is possible for buffers that do not depend on the examples (counters, power iterations), on which all parts
    agree, and for running statistics of instance normalisation, which are means over the examples.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._start = model, Buffers(model)
        self._first: dict[_Place, Tensor] = {}
        self._means: dict[_Place, Tensor] = {}
        self._examples = 0

    def replayed(self) -> AbstractContextManager[None]:
        """Run a part again; changes of the buffers are undone."""
        return self._start.replayed()

    @contextmanager
    def of_part(self, examples: int) -> Iterator[None]:
        with self._start.replayed():
            yield
            self._examples += examples
            for key, buffer in self._now():
                if _is_mean(*key):
                    so_far = self._means.get(key)
                    self._means[key] = examples * buffer if so_far is None else so_far + examples * buffer
                elif not stored_alike(self._first.setdefault(key, buffer), buffer):
                    raise EngineUnavailable(
                        f"what a forward pass leaves in buffer '{self._name(*key)}' depends on its "
                        "examples, so parts of a batch cannot replace the whole; leave out micro_batch"
                    )

    def finish(self) -> None:
        """Leave in the model what one pass over all parts would have left."""
        for key, buffer in list(self._now()):
            value = self._means[key] / self._examples if key in self._means else self._first[key]
            if buffer.shape != value.shape:
                key[0]._buffers[key[1]] = value
            elif not stored_alike(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)

    def _name(self, module: nn.Module, name: str) -> str:
        return ".".join(filter(None, (name_of(self._model, module), name)))

    def _now(self) -> Iterator[tuple[_Place, Tensor]]:
        for module in keepers_of(self._model):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield (module, name), buffer


def _is_mean(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.modules.instancenorm._InstanceNorm) and name in ("running_mean", "running_var")
