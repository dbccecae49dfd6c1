"""A forward pass may write into parameters (a running centre, clipped weights); one that does not count must not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metakern.capture.function import function_of


class _Kept(NamedTuple):
    parameter: nn.Parameter
    storage: Tensor
    value: Tensor


class _Writes(TorchFunctionMode):
    """Keeps a copy of every parameter before the first call that may write into it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._owners: dict[int, list[nn.Parameter]] = {}
        for p in model.parameters():
            self._owners.setdefault(p.untyped_storage().data_ptr(), []).append(p)
        self.kept: dict[int, list[_Kept]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if args and (name == "__set__" or function_of(func).in_place) and name != "requires_grad_":
            for target in args[0] if isinstance(args[0], (list, tuple)) else (args[0],):
                if isinstance(target, Tensor):
                    self._keep(target)
        return func(*args, **(kwargs or {}))

    def _keep(self, target: Tensor) -> None:
        try:
            place = target.untyped_storage().data_ptr()
        except (NotImplementedError, RuntimeError):  # tensors without a storage, as inside vmap
            return
        if place in self._owners and place not in self.kept:
            self.kept[place] = [_Kept(p, p.data, p.detach().clone()) for p in self._owners[place]]


@contextmanager
def unchanged_parameters(model: nn.Module) -> Iterator[None]:
    """Parameters are as before after the block, in value and in storage."""
    writes = _Writes(model)
    try:
        with writes:
            yield
    finally:
        for kept in (entry for entries in writes.kept.values() for entry in entries):
            if kept.parameter.data_ptr() != kept.storage.data_ptr():
                kept.parameter.data = kept.storage
            with torch.no_grad():
                kept.parameter.data.copy_(kept.value)
