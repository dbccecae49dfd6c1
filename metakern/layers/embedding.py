"""Table look-up, torch.nn.functional.embedding: dots_n = sum_t <B_nt, V[a_nt]>; the padding row is ignored.

If other uses of the table, such as a tied head, already gave a gradient, rows are added to it. With sparse=True the
gradient is sparse, as after a backward pass: it has every row that was looked up, also by examples of weight zero,
since SparseAdam moves these too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern import ops
from metakern.capture.record import Call, Record
from metakern.capture.refusal import EngineUnavailable
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights, require_apart


def _applies(call: Call) -> bool:
    if call.argument(3, "max_norm") is not None:
        raise EngineUnavailable("an embedding with max_norm rewrites its weight in the forward pass; set max_norm=None")
    if call.argument(5, "scale_grad_by_freq", False):
        raise EngineUnavailable(
            "an embedding with scale_grad_by_freq=True couples the examples of a batch; set scale_grad_by_freq=False"
        )
    return True


def _padding(call: Call) -> int:
    """Index of the row that is ignored, or -1."""
    padding = call.argument(2, "padding_idx")
    return -1 if padding is None else padding % call.argument(1, "weight").shape[0]


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    call, grad, axis = record.call, record.output_grad, record.axes[0]
    table = tangents[id(call.argument(1, "weight"))]
    require_apart(record, examples, -1)
    # If examples do not come first, every row is separate, and rows are summed afterwards.
    first = examples if axis.leading else grad.numel() // grad.shape[-1]
    rows = ops.embedding_dots(
        call.argument(0, "input").reshape(first, -1),
        table.to(grad.dtype),
        grad.reshape(first, -1, grad.shape[-1]),
        padding_idx=call.argument(2, "padding_idx"),
    )
    return rows if axis.leading else axis.total(rows.view(grad.shape[:-1]), examples)


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    call, grad = record.call, record.output_grad
    indices, weight, padding = call.argument(0, "input"), call.argument(1, "weight"), _padding(call)
    found = weights.total.take_to_write(id(weight), grad.dtype)
    if found is None and _is_sparse(call):
        rows = _scaled_or_zero(record, weights)
        return {id(weight): torch.ops.aten.embedding_sparse_backward(rows, indices, weight.shape[0], padding, False)}
    indices, rows = _kept(record, weights)
    if found is None:
        return {id(weight): torch.ops.aten.embedding_dense_backward(rows, indices, weight.shape[0], padding, False)}
    if padding >= 0:
        rows.masked_fill_((indices == padding).unsqueeze(-1), 0.0)
    _add_rows(found, rows, indices)
    return {id(weight): found}


def _is_sparse(call: Call) -> bool:
    return call.func is F.embedding and bool(call.argument(6, "sparse", False))


def _kept(record: Record, weights: Weights) -> tuple[Tensor, Tensor]:
    """Indices and w_n B_n, of examples of non-zero weight if the host knows them."""
    indices, grad, axis, w = record.call.argument(0, "input"), record.output_grad, record.axes[0], weights.values
    if axis.leading and axis.inner == 1 and weights.kept is not None:
        indices, grad = indices[weights.kept], grad[weights.kept]
        return indices, grad * w[weights.kept].view(-1, *(1,) * (grad.dim() - 1)).to(grad.dtype)
    return indices, grad * axis.spread(w, grad.shape).to(grad.dtype)


def _scaled_or_zero(record: Record, weights: Weights) -> Tensor:
    """w_n B_n, zero for examples of weight zero, whatever their B."""
    grad = record.output_grad
    w = record.axes[0].spread(weights.values, grad.shape).to(grad.dtype)
    return (grad * w).masked_fill_(w == 0, 0.0)


def _add_rows(table: Tensor, rows: Tensor, indices: Tensor) -> None:
    """In a fixed order: on a CPU that of the rows; elsewhere `index_put_` sorts them."""
    indices, rows = indices.reshape(-1), rows.reshape(-1, rows.shape[-1])
    if table.device.type == "cpu":
        table.index_add_(0, indices, rows)
    else:
        table.index_put_((indices,), rows, accumulate=True)


RULE = LayerRule(_applies, dots, weighted_grads, sparse=_is_sparse, fresh=True)
