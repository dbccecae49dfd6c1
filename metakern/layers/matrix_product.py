"""Y = A W + b with W [i, o]: matmul, `@`, mm and addmm, as in the Conv1D of GPT-2.

dots_n = sum_t A_nt^T V B_nt + sum_t B_nt . v;  weighted gradient sum_nt w_n A_nt B_nt^T and sum_nt w_n B_nt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metakern import ops
from metakern.capture.layout import is_sparse
from metakern.capture.record import Call, Record
from metakern.layers.linear import bias_dots, bias_gradient, row_weights, rows_of, sum_rows
from metakern.layers.precision import direction_dots
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights

PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
SUMS = (torch.addmm,)


def operands(call: Call) -> tuple[Tensor | None, Tensor, Tensor]:
    """b, A and W."""
    if call.func in SUMS:
        return call.argument(0, "input"), call.argument(1, "mat1"), call.argument(2, "mat2")
    other = "mat2" if call.func in (torch.mm, torch.Tensor.mm) else "other"
    return None, call.argument(0, "input"), call.argument(1, other)


def _applies(call: Call) -> bool:
    """Only W, and a bias [o], may be trained."""
    shift, inputs, weight = operands(call)
    trained = {id(p) for _, p in call.parameters}
    if weight.dim() != 2 or inputs.dim() < 2 or id(inputs) in trained or call.kwargs.keys() & {"beta", "alpha", "out"}:
        return False
    if is_sparse(inputs):
        return False
    return shift is None or id(shift) not in trained or tuple(shift.shape) == (weight.shape[1],)


def _trained(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """W and b, if trained."""
    shift, _, weight = operands(call)
    trained = {id(p) for _, p in call.parameters}
    return weight if id(weight) in trained else None, shift if shift is not None and id(shift) in trained else None


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    _, inputs, _ = operands(record.call)
    a, b = rows_of(record, inputs, examples)
    direction, bias = (None if p is None else tangents.get(id(p)) for p in _trained(record.call))
    terms = [] if direction is None else [direction_dots(record.dot_precision, a, direction.t().to(a.dtype), b)]
    if bias is not None:
        terms.append(bias_dots(b, bias))
    return sum_rows(record, sum(terms[1:], terms[0]), examples)


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    _, inputs, _ = operands(record.call)
    a, b = rows_of(record, inputs, weights.examples)
    w, (weight, bias) = row_weights(record, weights), _trained(record.call)
    found: Gradients = {}
    if weight is not None:
        start = weights.total.take(id(weight), a.dtype)
        found[id(weight)], _ = ops.weighted_grad(b, a, w, start=start)
    if bias is not None:
        found[id(bias)] = bias_gradient(b, w)
    return found


RULE = LayerRule(_applies, dots, weighted_grads, fresh=True)
