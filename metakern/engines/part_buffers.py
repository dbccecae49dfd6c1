"""Buffers of a model that is run part by part, as if it had been run once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state import Buffers


class PartBuffers:
    """Every part starts from the buffers as they were; what the parts make of them must be what one pass would.

    That holds for buffers that do not depend on the examples (counters, power iterations), where all parts agree, and
    for running statistics of instance normalisation, which are means over the examples.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._start = model, Buffers(model)
        self._first: dict[tuple[str, str], Tensor] = {}
        self._means: dict[tuple[str, str], Tensor] = {}
        self._examples = 0

    def replayed(self) -> AbstractContextManager[None]:
        """Run a part once more: nothing that happens to the buffers counts."""
        return self._start.replayed()

    @contextmanager
    def of_part(self, examples: int) -> Iterator[None]:
        with self._start.replayed():
            yield
            self._examples += examples
            for key, module, buffer in self._now():
                if _is_mean(module, key[1]):
                    so_far = self._means.get(key)
                    self._means[key] = examples * buffer if so_far is None else so_far + examples * buffer
                elif not torch.equal(self._first.setdefault(key, buffer), buffer):
                    raise EngineUnavailable(
                        f"what a forward pass leaves in buffer '{'.'.join(filter(None, key))}' depends on its "
                        "examples, so parts of a batch cannot stand for the whole; leave out micro_batch"
                    )

    def finish(self) -> None:
        """Leave in the model what one pass over all parts would have left."""
        for key, module, buffer in list(self._now()):
            value = self._means[key] / self._examples if key in self._means else self._first[key]
            if buffer.shape != value.shape:
                module._buffers[key[1]] = value
            elif not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)

    def _now(self) -> Iterator[tuple[tuple[str, str], nn.Module, Tensor]]:
        for path, module in self._model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield (path, name), module, buffer


def _is_mean(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.modules.instancenorm._InstanceNorm) and name in ("running_mean", "running_var")
