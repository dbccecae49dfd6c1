"""Which part of a layer's output belongs to which example: measured, not assumed.

Layers see the batch first, second (time-major attention), or folded into another dimension (tokens as rows, windows).
Weighting the losses by distinct random numbers and running the backward pass once more scales B by exactly the number
of the example each entry belongs to. That tells the axis apart, and it proves the premise of every per-layer dot:
if no axis explains the scaled B, examples interact (batch statistics, contrastive losses, graphs) and per-layer dots
would be wrong, so this engine refuses. The verdict is kept per model and structure; later steps do not pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metakern.capture.graph import output_gradients
from metakern.capture.record import Trace
from metakern.capture.refusal import EngineUnavailable


class ExampleAxis(NamedTuple):
    """Dimension `dim` of an output has size outer * n * inner, and the middle factor counts examples."""

    dim: int
    outer: int
    inner: int

    def folded(self, tensor: Tensor, examples: int) -> Tensor:
        """View `tensor` with that dimension split in three; the examples are at `dim + 1`."""
        return tensor.unflatten(self.dim, (self.outer, examples, self.inner))

    def spread(self, per_example: Tensor, shape: Sequence[int]) -> Tensor:
        """One value per example, repeated along dimension `dim` and broadcastable against an output of `shape`."""
        line = per_example.view(1, -1, 1).expand(self.outer, -1, self.inner).reshape(-1)
        return line.view(*(shape[self.dim] if d == self.dim else 1 for d in range(len(shape))))

    def total(self, tensor: Tensor, examples: int) -> Tensor:
        """Sum of `tensor` over everything but the examples."""
        folded = self.folded(tensor, examples)
        return folded.sum([d for d in range(folded.dim()) if d != self.dim + 1])

    @property
    def leading(self) -> bool:
        """Examples come first, each as one contiguous block."""
        return self.dim == 0 and self.outer == 1


class _Kind(NamedTuple):
    """An axis without the sizes that vary from batch to batch."""

    dim: int
    fold: str  # "none", "inner", "outer", or "mixed" when both factors exceed 1


# model -> structure of its pass -> kind of axis for each output, or the reason for a refusal
_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[Hashable, list[list[_Kind]] | str]] = WeakKeyDictionary()


def example_axes(model: torch.nn.Module, trace: Trace, context: Hashable) -> list[list[ExampleAxis]]:
    """The example axis of every output of every use; raises EngineUnavailable where examples interact.

    `context` names what else may couple examples beside the traced calls: the loss function and the training flag.
    """
    if trace.examples == 1:
        return [[ExampleAxis(0, 1, shape[0] if shape else 1) for shape in use.output_shapes] for use in trace.uses]
    structure = (context, tuple((use.name, tuple(len(s) for s in use.output_shapes)) for use in trace.uses))
    known = _KNOWN.setdefault(model, {})
    verdict = known.get(structure)
    if isinstance(verdict, str):
        raise EngineUnavailable(verdict)
    if verdict is not None:
        axes = [[_sized(k, s, trace.examples) for k, s in zip(ks, u.output_shapes)] for ks, u in zip(verdict, trace.uses)]
        if all(axis is not None for line in axes for axis in line):
            return axes  # type: ignore[return-value]
    return _measure(trace, known, structure)


def _measure(trace: Trace, known: dict, structure: Hashable) -> list[list[ExampleAxis]]:
    n = trace.examples
    generator = torch.Generator().manual_seed(0)
    numbers = (0.5 + torch.rand(n, generator=generator, dtype=torch.float64)) * torch.randint(
        0, 2, (n,), generator=generator
    ).mul(2).sub(1)
    numbers = numbers.to(trace.losses)
    plain = output_gradients(trace, retain_graph=True)
    scaled = output_gradients(trace, numbers, retain_graph=True)
    axes, certain = [], True
    for use, before, after in zip(trace.uses, plain, scaled):
        line = []
        for shape, b, c in zip(use.output_shapes, before, after):
            fitting = [] if b is None or c is None else [a for a in candidates(shape, n) if _explains(a, b, c, numbers)]
            if b is not None and c is not None and not fitting:
                known[structure] = reason = (
                    f"examples interact: the gradient of one example's loss reaches the output of {use.name} (shape "
                    f"{tuple(shape)}) at rows of other examples, so per-layer dots would be wrong; engine='jvp' is exact"
                )
                raise EngineUnavailable(reason)
            certain = certain and len(fitting) == 1
            line.append(fitting[0] if fitting else ExampleAxis(0, 1, 1))
        axes.append(line)
    if certain:
        known[structure] = [[_Kind(a.dim, _fold(a)) for a in line] for line in axes]
    return axes


def candidates(shape: Sequence[int], examples: int) -> Iterator[ExampleAxis]:
    """Every way in which a dimension of `shape` may hold the examples, the usual ones first."""
    for dim, size in enumerate(shape):
        if size and size % examples == 0:
            rest = size // examples
            divisors = [d for d in range(1, math.isqrt(rest) + 1) if rest % d == 0]
            outers = sorted({*divisors, *(rest // d for d in divisors)})
            outers.sort(key=lambda outer: outer not in (1, rest))
            for outer in outers:
                yield ExampleAxis(dim, outer, rest // outer)


def _explains(axis: ExampleAxis, plain: Tensor, scaled: Tensor, numbers: Tensor) -> bool:
    """Is `scaled` equal to `plain` times the number of the example that each entry would belong to?"""
    allowed = min(0.1, 1024 * max(torch.finfo(plain.dtype).eps, torch.finfo(numbers.dtype).eps))
    plain, scaled = plain.double(), scaled.double()
    expected = plain * axis.spread(numbers.double(), plain.shape)
    return bool((scaled - expected).norm() <= allowed * expected.norm())


def _fold(axis: ExampleAxis) -> str:
    if axis.outer > 1:
        return "outer" if axis.inner == 1 else "mixed"
    return "inner" if axis.inner > 1 else "none"


def _sized(kind: _Kind, shape: Sequence[int], examples: int) -> ExampleAxis | None:
    size = shape[kind.dim]
    rest, left = divmod(size, examples)
    if left or rest == 0 or kind.fold == "mixed" or (kind.fold == "none" and rest != 1):
        return None
    return ExampleAxis(kind.dim, rest, 1) if kind.fold == "outer" else ExampleAxis(kind.dim, 1, rest)
