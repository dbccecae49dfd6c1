"""Bags of table rows, torch.nn.functional.embedding_bag.

Sums and means are linear in the table: dots_n = <B_n, bag(tokens_n; V)>. A maximum takes each entry d from one row r_nd
of its bag: dots_n = sum_d B_nd V[r_nd, d], and that row gets the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.capture.record import Call, Record
from metakern.capture.refusal import EngineUnavailable
from metakern.layers import generic
from metakern.layers.inner import per_example_inner
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights


def _applies(call: Call) -> bool:
    if call.argument(3, "max_norm") is not None:
        raise EngineUnavailable(
            "an embedding bag with max_norm rewrites its weight in the forward pass; set max_norm=None"
        )
    if call.argument(5, "scale_grad_by_freq", False):
        raise EngineUnavailable(
            "an embedding bag with scale_grad_by_freq=True couples the examples of a batch; set it to False"
        )
    return call.parameter(1, "weight") is not None and len(call.parameters) == 1


def _is_sparse(call: Call) -> bool:
    return call.func is F.embedding_bag and bool(call.argument(7, "sparse", False))


def _maximal(call: Call) -> bool:
    return call.argument(6, "mode", "mean") == "max"


def _rows(call: Call) -> tuple[Tensor, Tensor]:
    """The row of the table that each entry [bags, width] was taken from, and which bags [bags, 1] hold any row."""
    tokens, offsets = call.argument(0, "input"), call.argument(2, "offsets")
    if tokens.dim() == 2:
        offsets = torch.arange(0, tokens.numel(), tokens.shape[1], dtype=tokens.dtype, device=tokens.device)
    weight, last, padding = call.argument(1, "weight"), call.argument(9, "include_last_offset", False), None
    if call.argument(10, "padding_idx") is not None:
        padding = call.argument(10, "padding_idx") % weight.shape[0]
    with torch.no_grad():
        flat = tokens.reshape(-1)
        _, _, sizes, rows = torch.embedding_bag(weight, flat, offsets, False, 2, False, None, last, padding)
    return rows.long(), (sizes[: rows.shape[0]] != 0).unsqueeze(1)


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    if not _maximal(record.call):
        return generic.linear_dots(record, tangents, examples)
    grad = record.output_grad
    rows, held = _rows(record.call)
    table = tangents[id(record.call.argument(1, "weight"))].to(grad.dtype)
    return per_example_inner(table.gather(0, rows) * held, grad, record.axes[0], examples)


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    if not _maximal(record.call):
        return generic.weighted_grads(record, weights)
    grad, weight = record.output_grad, record.call.argument(1, "weight")
    rows, held = _rows(record.call)
    scaled = grad * record.axes[0].spread(weights.values, grad.shape).to(grad.dtype) * held
    return {id(weight): torch.zeros_like(weight, dtype=grad.dtype).scatter_add_(0, rows, scaled)}


RULE = LayerRule(_applies, dots, weighted_grads, sparse=_is_sparse)
