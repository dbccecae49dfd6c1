"""Y = A W^T + b or A W + b with a sparse A: word counts, one-hot features. Nothing of A's size is made dense.

dots_n = <B_n, A_n V^T + v>;  weighted gradient (A^T diag(w) B)^T and sum_n w_n B_n; transposed for W [i, o].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.capture.record import Call, Record
from metakern.layers import matrix_product
from metakern.layers.generic import contract, scaled_output_grads
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights

FUNCTIONS = (F.linear, *matrix_product.PRODUCTS, torch.sparse.mm, torch.spmm, *matrix_product.SUMS)
_KINDS = (torch.sparse_coo, torch.sparse_csr)


def _operands(call: Call) -> tuple[Tensor | None, Tensor, Tensor]:
    """b, A and W."""
    if call.func is F.linear:
        return call.argument(2, "bias"), call.argument(0, "input"), call.argument(1, "weight")
    if call.func in (torch.sparse.mm, torch.spmm):
        return None, call.args[0], call.args[1]
    return matrix_product.operands(call)


def _applies(call: Call) -> bool:
    """Nothing but a trained bias [o] is added to A W, so that Y is linear in the trained tensors."""
    if len(call.args) < 2 or not call.kwargs.keys() <= {"bias"}:
        return False
    bias, inputs, weight = _operands(call)
    trained = {id(p) for _, p in call.parameters}
    if inputs.layout not in _KINDS or weight.layout != torch.strided or weight.dim() != 2 or id(inputs) in trained:
        return False
    return id(weight) in trained and (bias is None or (id(bias) in trained and bias.dim() == 1))


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    bias, inputs, weight = _operands(record.call)
    terms = []
    if id(weight) in tangents:
        direction = tangents[id(weight)].to(inputs.dtype)
        terms.append(inputs.detach() @ (direction.t() if record.call.func is F.linear else direction))
    if bias is not None and id(bias) in tangents:
        terms.append(tangents[id(bias)].to(inputs.dtype).expand(record.output_grad.shape))
    return contract(record, [sum(terms[1:], terms[0]).to(record.output_grad.dtype)], examples)


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    bias, inputs, weight = _operands(record.call)
    (scaled,) = scaled_output_grads(record, weights)
    assert scaled is not None
    gradient = inputs.detach().t() @ scaled.to(inputs.dtype)
    found = {id(weight): (gradient.t() if record.call.func is F.linear else gradient).to(weight.dtype)}
    if bias is not None:
        found[id(bias)] = scaled.sum(0)
    return found


RULE = LayerRule(_applies, dots, weighted_grads, fresh=True)
