"""An implicit virtual step: run the meta batch at theta^ = theta0 - k sum_n c_n g_n without forming it.

For a weight W of a linear layer with records A, B of the train batch and inputs A' of the meta batch,

    A' W^^T = A' W0^T - k (A' A^T) diag(c) B

and the backward pass likewise, by autograd. With few meta rows the two thin products cost far less than the weighted
gradient, and the dots of that weight are taken in the pairs form. All other parameters move explicitly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metakern.capture import trace_batch
from metakern.capture.examples import ExampleAxis
from metakern.capture.graph import require_complete
from metakern.capture.record import Record, Trace
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state import unchanged_buffers
from metakern.capture.trace import tensor_arguments, tensors_in
from metakern.capture.unrolled import LastingMode
from metakern.dots import pairable
from metakern.dots.pairs import GRAM_OVERHEAD
from metakern.engines.problem import Problem, named_gradients
from metakern.engines.recorded import Recorded
from metakern.engines.substitution import require_replaced, substituted
from metakern.layers.linear import matrices


@dataclass(frozen=True)
class Move:
    """The move of one weight: W^ = origin - factor * sum_n c_n B_n^T A_n."""

    use: int  # index of the weight's only use in the train pass
    origin: Tensor  # [o, i]
    factor: float
    inputs: Tensor  # A, [rows, i]
    scaled_grads: Tensor  # c B, [rows, o]


def implicit_weights(problem: Problem, train: Recorded) -> dict[str, int]:
    """Names of the weights for which not forming W^ is cheaper -> index of their use in the train pass."""
    names = {id(p): name for name, p in problem.chosen.items()}
    share = _elements(problem.meta_batch) / max(_elements(problem.batch), 1)
    found = {}
    for key, k in pairable(train.trace, {id(p): p for p in problem.chosen.values()}).items():
        use = train.trace.uses[k]
        if use.call.func is F.linear and train.records[k] is not None:
            rows = use.output_shapes[0][:-1].numel()
            if implicit_is_cheaper(rows, rows * share, *use.call.argument(1, "weight").shape):
                found[names[key]] = k
    return found


def implicit_is_cheaper(rows: float, meta_rows: float, outputs: int, inputs: int) -> bool:
    """Compare multiplications: forward, backward and dots by Grams, against forming W^ and V and the dots along V."""
    grams = rows * meta_rows * 3 * (inputs + outputs + GRAM_OVERHEAD)
    return grams < (2 * rows + meta_rows) * inputs * outputs


def move(train: Recorded, use: int, origin: Tensor, factor: float, coefficients: Tensor) -> Move:
    """What the meta pass needs to know of one weight's train records."""
    record = train.records[use]
    assert record is not None
    a, b = matrices(record, coefficients.shape[0])
    axis = record.axes[0]
    shape = record.output_grad.shape[:-1]
    c = axis.spread(coefficients, shape).expand(shape).reshape(-1, 1)
    b = b.reshape(-1, b.shape[-1])
    return Move(use, origin, factor, a.reshape(-1, a.shape[-1]), b * c.to(b.dtype))


def meta_pass_at(
    problem: Problem, moves: Mapping[str, Move], explicit: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[int, Record]] | None:
    """Mean meta loss at theta^, its gradient in the explicit parameters, and meta records for the implicit weights.

    The records' B' belong to the mean loss, times the factor of the move. None if the meta batch uses an implicit
    weight otherwise than once in a linear layer; nothing has changed then.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in explicit.items()}
    replacement = {id(problem.chosen[name]): leaf for name, leaf in leaves.items()}
    weights = {id(problem.chosen[name]): given for name, given in moves.items()}
    moving = _Moving(weights)
    with unchanged_buffers(problem.model), problem.writes.taken_back(), substituted(problem.model, replacement), moving:
        trace = trace_batch(problem.model, problem.meta_batch, problem.loss_fn, problem.trainable, "meta_batch")
        places = _places(problem, trace, weights)
        if places is None or moving.seen_unmoved:
            return None
        edges = [trace.uses[place].edges[0] for place in places]
        meta_loss = trace.losses.mean()
        originals = [problem.chosen[name] for name in leaves]
        found = torch.autograd.grad(meta_loss, [*leaves.values(), *edges, *originals], allow_unused=True)
    require_replaced(leaves, found[len(leaves) + len(edges) :])
    gradient = named_gradients(leaves, found)
    paired = {}
    for given, place, grad in zip(moves.values(), places, found[len(leaves) :]):
        if grad is not None:
            paired[given.use] = Record(trace.uses[place], (grad * given.factor,), (ExampleAxis(0, 1, grad.shape[0]),))
    return meta_loss.detach(), gradient, paired


class _Moving(LastingMode):
    """Linear layers answer as if their weight had moved; notes whether such a weight was used in another way."""

    def __init__(self, weights: Mapping[int, Move]) -> None:
        super().__init__()
        self._weights = weights
        self.seen_unmoved = False

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        met = [id(tensor) for _, tensor in tensor_arguments(args, kwargs) if id(tensor) in self._weights]
        if not met:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        if func is F.linear and met == [id(given["weight"])]:
            return self._moved(given["input"], given["weight"], given.get("bias"))
        output = func(*args, **kwargs)
        # Its shape or dtype may be asked for; its values may not, with a gradient or without.
        self.seen_unmoved |= any(True for _ in tensors_in(output))
        return output

    def _moved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        moved = self._weights[id(weight)]
        # The weight as it was stays in the graph, without being asked for, so that the output always has an edge.
        origin = weight if moved.origin is weight else moved.origin.detach().requires_grad_(weight.requires_grad)
        gram = x.to(moved.inputs.dtype) @ moved.inputs.t()
        return F.linear(x, origin, bias) - ((gram * moved.factor) @ moved.scaled_grads).to(x.dtype)


def _places(problem: Problem, trace: Trace, weights: Mapping[int, Move]) -> list[int] | None:
    """Index of the only use of every implicit weight in the meta pass."""
    by_identity = {id(p): p for p in problem.chosen.values() if id(p) in weights}
    found = pairable(trace, by_identity)
    if any(key not in found or trace.uses[found[key]].call.func is not F.linear for key in weights):
        return None
    try:
        require_complete(trace, {key: "" for key in weights})
    except EngineUnavailable:
        return None
    return [found[key] for key in weights]


def _elements(batch: Any) -> int:
    """Size of the first tensor of a batch, to guess how many rows of a layer one batch has beside another."""
    return next((leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), 1)
