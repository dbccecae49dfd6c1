"""Table look-up, torch.nn.functional.embedding: dots_n = sum_t <B_nt, V[a_nt]>; the padding row takes no part.

Where other uses of the table gave a gradient already, as the head does that is tied to it, rows are added to that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metakern import ops
from metakern.capture.record import Call, Record
from metakern.capture.refusal import EngineUnavailable
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights


def _applies(call: Call) -> bool:
    if call.argument(3, "max_norm") is not None:
        raise EngineUnavailable("an embedding with max_norm rewrites its weight in the forward pass; set max_norm=None")
    if call.argument(5, "scale_grad_by_freq", False):
        raise EngineUnavailable(
            "an embedding with scale_grad_by_freq=True couples the examples of a batch; set scale_grad_by_freq=False"
        )
    return True


def _padding(call: Call, rows: int) -> int:
    """Index of the row that takes no part, or -1."""
    padding = call.argument(2, "padding_idx")
    return -1 if padding is None else padding % rows


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    call, grad, axis = record.call, record.output_grad, record.axes[0]
    table = tangents[id(call.argument(1, "weight"))]
    # Where examples do not come first, every row stands alone and is added up afterwards.
    first = examples if axis.leading else grad.numel() // grad.shape[-1]
    rows = ops.embedding_dots(
        call.argument(0, "input").reshape(first, -1),
        table.to(grad.dtype),
        grad.reshape(first, -1, grad.shape[-1]),
        padding_idx=call.argument(2, "padding_idx"),
    )
    return rows if axis.leading else axis.total(rows.view(grad.shape[:-1]), examples)


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    call, grad, axis = record.call, record.output_grad, record.axes[0]
    indices, weight, w = call.argument(0, "input"), call.argument(1, "weight"), weights.values
    if axis.leading and axis.inner == 1 and weights.kept is not None:
        indices, grad = indices[weights.kept], grad[weights.kept]
        scaled = grad * w[weights.kept].view(-1, *(1,) * (grad.dim() - 1)).to(grad.dtype)
    else:
        scaled = grad * axis.spread(w, grad.shape).to(grad.dtype)
    padding = _padding(call, weight.shape[0])
    found = weights.taken_to_write(id(weight), scaled.dtype)
    if found is None:
        found = torch.ops.aten.embedding_dense_backward(scaled, indices, weight.shape[0], padding, False)
    else:
        _add_rows(found, scaled.masked_fill_((indices == padding).unsqueeze(-1), 0.0), indices)
    return {id(weight): found}


def _add_rows(table: Tensor, rows: Tensor, indices: Tensor) -> None:
    """In an order that is the same every time: on a CPU that of the rows; elsewhere `index_put_` sorts them."""
    indices, rows = indices.reshape(-1), rows.reshape(-1, rows.shape[-1])
    if table.device.type == "cpu":
        table.index_add_(0, indices, rows)
    else:
        table.index_put_((indices,), rows, accumulate=True)


RULE = LayerRule(_applies, dots, weighted_grads, fresh=True)
