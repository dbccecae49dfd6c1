"""Any differentiable call: forward mode and one vector-Jacobian product through that call alone."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.capture.record import Record
from metakern.layers.inner import per_example_inner
from metakern.layers.replay import output_tangents, parameter_gradients, with_parameters
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights


def contract(record: Record, tangents: list[Tensor | None], examples: int) -> Tensor:
    """sum over outputs of <B_n, output tangent_n>, [n]."""
    terms = []
    for place, grad, axis in zip(record.use.output_places, record.output_grads, record.axes):
        tangent = tangents[place]
        if grad is not None and tangent is not None:
            terms.append(per_example_inner(grad, tangent.to(grad.dtype), axis, examples))
    if not terms:
        grad = next(g for g in record.output_grads if g is not None)
        return torch.zeros(examples, dtype=grad.dtype, device=grad.device)
    return sum(terms[1:], terms[0])


def scaled_output_grads(record: Record, weights: Weights) -> tuple[Tensor | None, ...]:
    """w_n B_n for every output."""
    return tuple(
        None if grad is None else grad * axis.spread(weights.values, grad.shape).to(grad.dtype)
        for grad, axis in zip(record.output_grads, record.axes)
    )


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    return contract(record, output_tangents(record.call, tangents), examples)


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    return parameter_gradients(record.call, record.use.output_places, scaled_output_grads(record, weights))


def linear_dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    """`dots` for a call that is linear in its trainable tensors, <B_n, f(A_n; V)>: no forward mode needed."""

    def direction(parameter: Tensor) -> Tensor:
        v = tangents.get(id(parameter))
        return torch.zeros_like(parameter) if v is None else v

    with torch.no_grad():
        responses = with_parameters(record.call, direction)
    return contract(record, list(responses), examples)


RULE = LayerRule(lambda call: True, dots, weighted_grads)
