"""Y = A W^T + b: torch.nn.functional.linear, on any number of leading dimensions.

dots_n = sum_t B_nt^T V A_nt + sum_t B_nt . v;  weighted gradient sum_nt w_n B_nt A_nt^T and sum_nt w_n B_nt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metakern import ops
from metakern.capture.layout import is_sparse
from metakern.capture.record import Call, Record
from metakern.layers.per_example import cheaper
from metakern.layers.precision import direction_dots
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights, require_apart
from metakern.ops.operands import accumulator


def _applies(call: Call) -> bool:
    if is_sparse(call.argument(0, "input")):
        return False
    return call.argument(1, "weight").dim() == 2 and all([path.key not in (0, "input") for path, _ in call.parameters])


def _rows_per_example(record: Record) -> bool:
    return record.axes[0].leading


def matrices(record: Record, examples: int) -> tuple[Tensor, Tensor]:
    """A[n,t,i] and B[n,t,o]; if examples do not come first, every row is separate: A[rows,1,i], B[rows,1,o]."""
    return rows_of(record, record.call.argument(0, "input"), examples)


def rows_of(record: Record, inputs: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """The same for any product of inputs with a matrix; sparse inputs occur if those of the other batch are dense.

    Raises: EngineUnavailable if examples lie along the columns.
    """
    require_apart(record, examples, -1)
    inputs, grad = inputs.detach(), record.output_grad
    if is_sparse(inputs):
        inputs = inputs.to_dense()
    first = examples if _rows_per_example(record) else grad.numel() // grad.shape[-1]
    return (
        inputs.to(grad.dtype).reshape(first, -1, inputs.shape[-1]),
        grad.reshape(first, -1, grad.shape[-1]),
    )


def sum_rows(record: Record, rows: Tensor, examples: int) -> Tensor:
    """Dots per row to dots per example."""
    if _rows_per_example(record):
        return rows
    return record.axes[0].total(rows.view(record.output_grad.shape[:-1]), examples)


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    a, b = matrices(record, examples)
    direction = _tangent(record, tangents, 1, "weight")
    bias = _tangent(record, tangents, 2, "bias")
    total = None if direction is None else direction_dots(record.dot_precision, a, direction.to(a.dtype), b)
    if bias is not None:
        through_bias = bias_dots(b, bias)
        total = through_bias if total is None else total + through_bias
    assert total is not None
    return sum_rows(record, total, examples)


def bias_dots(b: Tensor, direction: Tensor) -> Tensor:
    """sum_t B_nt . v, [n]."""
    dtype = accumulator(b.dtype)  # the dtype of dots, which a sum over positions needs
    rows = b.squeeze(1).to(dtype) if b.shape[1] == 1 else b.sum(1, dtype=dtype)
    return torch.mv(rows, direction.to(dtype))


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    a, b = matrices(record, weights.examples)
    w = row_weights(record, weights)
    found: Gradients = {}
    weight, bias = record.call.parameter(1, "weight"), record.call.parameter(2, "bias")
    if weight is not None:
        start = weights.total.take(id(weight), a.dtype)
        found[id(weight)], shift = ops.weighted_grad(a, b, w, bias=bias is not None, start=start)
        if bias is not None:
            found[id(bias)] = shift
    elif bias is not None:
        found[id(bias)] = bias_gradient(b, w)
    return found


def row_weights(record: Record, weights: Weights) -> Tensor:
    """The weight of every example, or of every row if rows are separate."""
    if _rows_per_example(record):
        return weights.values
    shape = record.output_grad.shape[:-1]
    return record.axes[0].spread(weights.values, shape).expand(shape).reshape(-1)


def bias_gradient(b: Tensor, w: Tensor) -> Tensor:
    """sum_nt w_n B_nt, [o]."""
    rows = w.to(b.dtype).repeat_interleave(b.shape[1]) if b.shape[1] > 1 else w.to(b.dtype)
    return torch.mv(b.reshape(-1, b.shape[-1]).t(), rows)


def per_example(record: Record, examples: int) -> Gradients | None:
    """sum_t B_nt A_nt^T, [n, o i], and sum_t B_nt, if there are several positions and it is cheaper."""
    weight, bias = record.call.parameter(1, "weight"), record.call.parameter(2, "bias")
    a, b = matrices(record, examples)
    if weight is None or a.shape[1] == 1 or not cheaper(weight, a, b, examples):
        return None
    found = {id(weight): torch.bmm(b.transpose(1, 2), a).flatten(1)}
    if bias is not None:
        found[id(bias)] = b.sum(1)
    return found


def _tangent(record: Record, tangents: Tangents, position: int, keyword: str) -> Tensor | None:
    parameter = record.call.parameter(position, keyword)
    return None if parameter is None else tangents.get(id(parameter))


RULE = LayerRule(_applies, dots, weighted_grads, matrices, per_example, fresh=True)
