"""The interface of every layer rule: what a use does with a direction, and with weighted output gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from metakern.capture.record import Call, Record
from metakern.capture.refusal import EngineUnavailable
from metakern.layers.total import Total

Tangents = Mapping[int, Tensor]  # identity of a trainable tensor -> V, the direction in it
Gradients = dict[int, Tensor]  # identity of a trainable tensor -> its gradient


def require_apart(record: Record, examples: int, *features: int) -> None:
    """Raise EngineUnavailable if examples lie along one of these dimensions of an output, which hold its features."""
    shape = record.output_grad.shape
    if examples > 1 and record.axes[0].dim in [dim % len(shape) for dim in features]:
        raise EngineUnavailable(
            f"examples lie along the features of {record.use.name} (output of shape {tuple(shape)}), so that a row "
            "belongs to all of them; engine='jvp' is exact"
        )


@dataclass(frozen=True)
class Weights:
    """The weights of one batch, and which of them are not zero, if the host knows."""

    values: Tensor  # [n]
    nonzero: Tensor | None  # indices of the weights that are not zero, None if the host does not know them
    total: Total = field(default_factory=Total)  # sum over earlier uses

    @property
    def examples(self) -> int:
        return self.values.shape[0]

    @property
    def kept(self) -> Tensor | None:
        """`nonzero`, but None also if no weight is zero, so that nothing has to be gathered."""
        return None if self.nonzero is None or self.nonzero.numel() == self.examples else self.nonzero


@dataclass(frozen=True)
class LayerRule:
    """How one kind of call contributes to dots and gradient.

    applies(call)                whether the rule covers this call; the generic rule covers the rest
    dots(record, V, n)           -> [n], sum over positions of <B_n, d output_n / d parameters . V>
    weighted_grads(record, w)    -> sum_n w_n B_n^T d output_n / d parameters, by parameter
    matrices(record, n)          -> A[n,t,i], B[n,t,o] if the use is a matrix product with its weight
    per_example(record, n)       -> G[n,numbers] by parameter if that is cheaper than computing several results from A
                                    and B, else None
    opened(record)               the record rewritten for another, simpler rule, as soon as B is known
    by_example                   form per_example in every pass, as soon as B is known, so that A and B are not kept
    sparse(call)                 whether it gives the table a sparse gradient, also if all of it is zero
    fresh                        every tensor that weighted_grads returns is newly made, one for each parameter, and
                                 held by nobody else: rules of other uses may write into it
    """

    applies: Callable[[Call], bool]
    dots: Callable[[Record, Tangents, int], Tensor]
    weighted_grads: Callable[[Record, Weights], Gradients]
    matrices: Callable[[Record, int], tuple[Tensor, Tensor]] | None = None
    per_example: Callable[[Record, int], Gradients | None] | None = None
    opened: Callable[[Record], Record] | None = None
    by_example: bool = False
    sparse: Callable[[Call], bool] = lambda call: False
    fresh: bool = False
