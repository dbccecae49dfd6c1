"""Run a model with other tensors instead of its parameters, without touching the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from metakern.capture.members import modules_of
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.unrolled import LastingMode


@contextmanager
def substituted(model: nn.Module, replacement: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside the block, every parameter whose identity is a key is replaced, wherever it is registered.

    Also wherever else a forward pass gets it from: a list, a closure, an attribute of another object.
    """
    swapped = [
        (module._parameters, name, p)
        for module in modules_of(model)
        for name, p in module._parameters.items()
        if p is not None and id(p) in replacement
    ]
    try:
        for owner, name, p in swapped:
            owner[name] = other = replacement[id(p)]  # type: ignore[assignment]
            other._is_param = True  # torch checks this if a forward pass ties one weight to another
        with _Elsewhere(replacement):
            yield
    finally:
        for owner, name, p in swapped:
            owner[name] = p


def require_replaced(names: Iterable[str], gradients: Iterable[Tensor | None]) -> None:
    """Raise EngineUnavailable if losses of a pass with other tensors depend on the parameters themselves.

    `gradients` are with respect to the parameters of these names, None if nothing depends on one.
    """
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            raise EngineUnavailable(
                f"parameter '{name}' is used through a tensor that was made from it before the forward pass, so it "
                "cannot be replaced for forward mode or a virtual step; make that tensor inside the forward pass"
            )


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class _Elsewhere(LastingMode):
    """Replaces parameters among the arguments of calls. Replacements claim to require a gradient, although dual tensors
    do not, for the sake of penalties on `p for p in model.parameters() if p.requires_grad`.
    """

    def __init__(self, replacement: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._replacement, self._standing = replacement, {id(tensor) for tensor in replacement.values()}

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func == _REQUIRES_GRAD and id(args[0]) in self._standing:
            return True
        if kwargs:
            kwargs = {key: self._replaced(value) for key, value in kwargs.items()}
        return func(*[self._replaced(value) for value in args], **kwargs)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._replacement.get(id(value), value)
        if isinstance(value, (list, tuple)) and any(id(item) in self._replacement for item in value):
            return type(value)([self._replaced(item) for item in value])
        return value
