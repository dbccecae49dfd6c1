"""Run a model with other tensors in place of its parameters, without touching the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def substituted(model: nn.Module, replacement: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside the block every parameter whose identity is a key is replaced, wherever it is registered."""
    swapped = [
        (module._parameters, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and id(p) in replacement
    ]
    try:
        for owner, name, p in swapped:
            owner[name] = replacement[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for owner, name, p in swapped:
            owner[name] = p
