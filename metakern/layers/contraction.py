"""Y = einsum(letters, A, W), which is linear in its one trained operand W, in either place. Also matmul and bmm where W
is not a single matrix on the right, as for heads and experts.

dots_n = <B_n, einsum(letters, A, V)_n>;  weighted gradient einsum(letters of A and Y -> letters of W, A, w B), without
examples of weight zero if examples come first in Y.
"""

from __future__ import annotations

import re
import string
from typing import NamedTuple

import torch
from torch import Tensor

from metakern.capture.layout import is_sparse
from metakern.capture.real_parts import RealParts
from metakern.capture.record import Call, Record
from metakern.layers.generic import linear_dots
from metakern.layers.matrix_product import PRODUCTS
from metakern.layers.rule import Gradients, LayerRule, Weights

FUNCTIONS = (torch.einsum, *PRODUCTS, torch.bmm, Tensor.bmm)
_LETTERS = r"((?:[a-zA-Z]|\.{3})*)"
_TWO_OPERANDS = re.compile(f"{_LETTERS},{_LETTERS}->{_LETTERS}")


class _Product(NamedTuple):
    """Letters and tensors of a product of two operands."""

    inputs: str
    weight: str
    outputs: str
    a: Tensor
    w: Tensor


def _product(call: Call) -> _Product | None:
    """None unless it has two operands, no letter twice in one, and none of W that is broadcast or occurs only there."""
    func = call.func.func if isinstance(call.func, RealParts) else call.func
    found = _of_einsum(call) if func is torch.einsum else _of_matrices(call)
    if found is None or len(call.parameters) != 1:
        return None
    first, second, outputs, operands = found
    if any(map(is_sparse, operands)):
        return None
    ((_, trained),) = call.parameters
    pairs = (first, operands[0]), (second, operands[1])
    (weight, w), (inputs, a) = pairs if operands[0] is trained else reversed(pairs)
    if "." in weight or inputs.count("...") != outputs.count("..."):
        return None
    unused = "".join(sorted(set(string.ascii_letters).difference(inputs, weight, outputs)))
    between = unused[: a.dim() - len(inputs.replace(".", ""))]
    inputs, outputs = inputs.replace("...", between), outputs.replace("...", between)
    twice = any(len(set(letters)) < len(letters) for letters in (inputs, weight))
    if twice or not set(weight) <= {*inputs, *outputs}:
        return None
    sizes = dict(zip(inputs, a.shape))
    # one that is summed over would have to be widened first
    broadcast = any(
        sizes.get(letter, size) != size and (sizes[letter] != 1 or letter not in outputs)
        for letter, size in zip(weight, w.shape)
    )
    return None if broadcast else _Product(inputs, weight, outputs, a, w)


_Lettered = tuple[str, str, str, tuple[Tensor, ...]]
"""The letters of both operands and of the output, and the operands."""


def _of_einsum(call: Call) -> _Lettered | None:
    if call.kwargs or not isinstance(call.args[0], str):
        return None
    operands = call.args[1] if isinstance(call.args[1], (list, tuple)) else call.args[1:]
    found = _TWO_OPERANDS.fullmatch(call.args[0].replace(" ", ""))
    return None if found is None or len(operands) != 2 else (found[1], found[2], found[3], tuple(operands))


def _of_matrices(call: Call) -> _Lettered | None:
    operands = (*call.args, *call.kwargs.values())
    if len(operands) != 2 or not operands[0].dim() or not operands[1].dim():
        return None
    left, right = (operand.dim() for operand in operands)
    stacked = string.ascii_lowercase[: max(left, right, 2) - 2]
    first = stacked[len(stacked) - max(left - 2, 0) :] + "XY"[-left:]
    second = stacked[len(stacked) - max(right - 2, 0) :] + "YZ"[:right]
    return first, second, stacked + "X" * (left > 1) + "Z" * (right > 1), operands


def _applies(call: Call) -> bool:
    return _product(call) is not None


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    product, axis, grad = _product(record.call), record.axes[0], record.output_grad
    assert product is not None
    a, w, example = product.a.detach(), weights.values, product.outputs[:1]
    alone = example in product.inputs and example not in product.weight  # W may have entries for single examples
    if weights.kept is not None and axis.leading and axis.inner == 1 and alone:
        a = a.index_select(product.inputs.index(example), weights.kept)
        grad, w = grad.index_select(0, weights.kept), w.index_select(0, weights.kept)
    scaled = grad * axis.spread(w, grad.shape).to(grad.dtype)
    if isinstance(record.call.func, RealParts):
        scaled = torch.view_as_complex(scaled)
    letters = f"{product.inputs},{product.outputs}->{product.weight}"
    found = torch.einsum(letters, a.conj().to(scaled.dtype), scaled)
    return {id(product.w): (found if product.w.is_complex() else found.real).to(product.w.dtype)}


RULE = LayerRule(_applies, linear_dots, weighted_grads)
