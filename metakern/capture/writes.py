"""A forward pass may write into tensors that were there before it: a running centre, a memory bank, clipped weights.
One that does not count must not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.overrides import TorchFunctionMode

from metakern.capture.function import function_of
from metakern.capture.members import parameters_of
from metakern.capture.outputs import tensors_in


class _Writes(TorchFunctionMode):
    """Keeps a copy of every tensor that may be from outside before the first call that may write into it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters: dict[int, list[nn.Parameter]] = {}
        for p in parameters_of(model):
            self._parameters.setdefault(_place(p), []).append(p)
        self._kept: dict[int, list[Callable[[], None]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        function = function_of(func)
        if function.in_place or kwargs or function.name == "__set__":
            self._before(function.name, args, kwargs or {}, function.in_place or function.name == "__set__")
        return func(*args, **(kwargs or {}))

    def _before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], in_place: bool) -> None:
        if in_place and name != "requires_grad_":
            for target in tensors_in(list(args[:1])):
                self._keep(target)
        for target in tensors_in(kwargs.get("out")):
            self._keep(target)
        generator = kwargs.get("generator")
        if generator is not None and id(generator) not in self._kept:
            self._kept[id(generator)] = [partial(generator.set_state, generator.get_state())]

    def _keep(self, target: Tensor) -> None:
        if target.grad_fn is not None or unpack_dual(target).tangent is not None:
            return  # an activation of this pass
        place = _place(target)
        if place == 0 or place in self._kept:
            return
        storage = target.untyped_storage()
        owners = [(t, t.data) for t in self._parameters.get(place, [target])]
        self._kept[place] = [*(partial(_rebind, *owner) for owner in owners), partial(storage.copy_, storage.clone())]

    def undo(self) -> None:
        for steps in self._kept.values():
            for put_back in steps:
                put_back()


def _place(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 where there is none, as inside vmap or for sparse tensors."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _rebind(tensor: Tensor, data: Tensor) -> None:
    """Undo `tensor.data = other`."""
    if tensor.data_ptr() != data.data_ptr():
        tensor.data = data


@contextmanager
def nothing_written(model: nn.Module) -> Iterator[None]:
    """Tensors that exist before the block are as before after it, in value and in storage."""
    writes = _Writes(model)
    try:
        with writes:
            yield
    finally:
        writes.undo()
