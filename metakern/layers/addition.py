"""x + p, as with positional embeddings and biases added by hand: dots_n = alpha <B_n, V>, without keeping x."""

from __future__ import annotations

from torch import Tensor

from metakern.capture.record import Call, Record
from metakern.layers.inner import per_example_inner
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights


def _applies(call: Call) -> bool:
    return len(call.parameters) == 1


def _scale(call: Call) -> float:
    """`alpha` multiplies the second argument only."""
    ((path, _),) = call.parameters
    return call.kwargs.get("alpha", 1) if path.key in (1, "other") else 1


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    grad = record.output_grad
    ((_, parameter),) = record.call.parameters
    response = (tangents[id(parameter)].to(grad.dtype) * _scale(record.call)).expand_as(grad)
    return per_example_inner(response, grad, record.axes[0], examples)


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    grad, axis = record.output_grad, record.axes[0]
    ((_, parameter),) = record.call.parameters
    scaled = grad * (axis.spread(weights.values, grad.shape) * _scale(record.call)).to(grad.dtype)
    return {id(parameter): scaled.sum_to_size(parameter.shape)}


RULE = LayerRule(_applies, dots, weighted_grads)
