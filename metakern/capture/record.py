"""What capture keeps: plain frozen values; nothing is attached to modules or parameters.

A *use* is one call of a torch function that mixes a trainable parameter (or a tensor derived from parameters alone)
with example data. A *derivation* is a call that makes such a tensor from parameters and constants alone: the transpose
of a weight, a normalised weight, a slice of positional embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


class ArgPath(NamedTuple):
    """Where a tensor is in a call: the position or keyword, and the index inside it if that is a sequence."""

    key: int | str
    item: int | None = None


class Call(NamedTuple):
    """One call of a torch function, with everything needed to make it again."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: tuple[tuple[ArgPath, Tensor], ...]  # the trainable tensors among the arguments
    outputs: tuple[Tensor | None, ...]  # differentiable outputs of a derivation; uses keep edges instead
    in_place: bool
    rng_state: Any = None  # set for random functions, so that a replay sees the same mask
    autocast: tuple[str, torch.dtype] | None = None  # device type and dtype, when the call ran under autocast
    versions: tuple[tuple[Tensor, int], ...] = ()  # data arguments with their version counters at the call

    def without_arguments(self) -> Call:
        """The call without the tensors it read, so that these can be freed."""
        parameters, outputs = self.parameters, self.outputs
        return Call(self.func, self.name, (), {}, parameters, outputs, self.in_place, self.rng_state, self.autocast)

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """The argument that the function calls `keyword`, however it was passed."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(keyword, default)

    def parameter(self, position: int, keyword: str) -> Tensor | None:
        """The trainable tensor passed as `keyword`, or None when that argument is absent, frozen or data."""
        for path, tensor in self.parameters:
            if path == (position, None) or path == (keyword, None):
                return tensor
        return None


def versions_of(tensors: Iterable[Tensor]) -> tuple[tuple[Tensor, int], ...]:
    """Tensors with their version counters; inference tensors have none, and are not written into."""
    return tuple([(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()])


class Use(NamedTuple):
    """A call in which parameters meet example data; B = d(sum of losses)/d(output) is taken at its edges."""

    call: Call
    edges: tuple[GradientEdge, ...]
    output_places: tuple[int, ...]  # which of the tensors that the call returns the edges belong to
    output_shapes: tuple[torch.Size, ...]
    upstream: tuple[Any, ...]  # autograd nodes of the data arguments, as they were before the call

    @property
    def name(self) -> str:
        return self.call.name

    def without_arguments(self) -> Use:
        return Use(self.call.without_arguments(), *self[1:])


Place = tuple[Any, int]
Gap = tuple[int, int]
"""The sequence number of the first node of a gap, and of the first node after the gap."""


def place_of(edge: GradientEdge) -> Place:
    """Node and output number, which identify a tensor in a graph."""
    return edge.node, edge.output_nr


class Pick(NamedTuple):
    """A call that selects entries of an activation by data along `dims`; harmless unless these hold the examples."""

    edge: GradientEdge | None  # of the activation; None if it is only written into
    shape: torch.Size
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """One traced forward pass: its per-example losses and every use of a trainable parameter."""

    losses: Tensor
    uses: tuple[Use, ...]
    derivations: tuple[Call, ...]
    couplings: tuple[str, ...] = ()  # reasons why examples are known to interact in this pass
    reorders: bool = False  # rows are selected by data, so that the order of examples may differ from pass to pass
    picks: tuple[Pick, ...] = ()  # where entries are selected by data along other dimensions than the first
    numbers: int = 0  # fingerprint of the Python numbers that calls on activations were made with
    hooked: frozenset[Place] = frozenset()  # tensors with a hook that may change their gradient
    first: int = 0  # the sequence number of the first node that the pass made
    gaps: tuple[Gap, ...] = ()  # sequence numbers of nodes that were made outside traced calls
    constants: Sequence[Tensor] = ()  # parameters and buffers of the model without a gradient

    def released(self) -> Trace:
        """A copy without uses, derivations and picks, so that the tensors they keep can be freed."""
        return replace(self, losses=self.losses.detach(), uses=(), derivations=(), picks=(), constants=())

    @property
    def examples(self) -> int:
        return self.losses.shape[0]


@dataclass(frozen=True, eq=False)
class Record:
    """A use with its output gradients B and, for each output, the axis that holds the examples."""

    use: Use
    output_grads: tuple[Tensor | None, ...]
    axes: tuple[Any, ...]
    dot_precision: str = "same"  # what the products behind the dots may be rounded to: "same", "tf32", "bf16" or "fp8"
    gradients: Mapping[int, Tensor] = field(default_factory=dict)  # per example, instead of A and B

    @property
    def call(self) -> Call:
        return self.use.call

    @property
    def output_grad(self) -> Tensor:
        """B of a use with a single output."""
        (grad,) = self.output_grads
        assert grad is not None
        return grad
