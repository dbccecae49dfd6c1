"""Context managers for `.grad`: restored after a block, set aside inside it, or checked for additions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from metakern.capture.refusal import EngineUnavailable


@contextmanager
def gradients_as_before(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """After the block the parameters have the gradients that they had before it."""
    before = [(p, p.grad) for p in parameters]
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad


@contextmanager
def gradients_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block `.grad` is None: reversible layers call `backward` within their backward pass, which would add
    to it in place.
    """
    parameters = list(parameters)
    with gradients_as_before(parameters):
        for p in parameters:
            p.grad = None
        yield


@contextmanager
def nothing_added(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Raise if a backward pass inside the block adds to `.grad` by itself, since metakern would miss that part.

    Raises: EngineUnavailable naming the parameter.
    """
    before = [(name, p, p.grad, None if p.grad is None else p.grad._version) for name, p in parameters.items()]
    yield
    for name, p, grad, version in before:
        if p.grad is not grad or (grad is not None and grad._version != version):
            raise EngineUnavailable(
                f"a backward pass inside the model adds to the gradient of parameter '{name}' by itself, as that of a "
                "custom autograd.Function may that calls backward, so metakern would miss it; return it from there"
            )
