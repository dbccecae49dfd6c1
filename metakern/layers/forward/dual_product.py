"""Products of dual matrices of which one is sparse: features, the edges of a graph.

torch has no forward mode for these, though a product is linear in both operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from metakern.capture.layout import is_sparse
from metakern.layers.forward.dual import unpacked
from metakern.layers.matrix_product import PRODUCTS

PAIRED = (*PRODUCTS, torch.sparse.mm, torch.spmm, torch.mv, Tensor.mv, torch.bmm, Tensor.bmm)
"""Functions of two factors only."""


def dual_product(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Y + r dY with dY = dA B + A dB; dense operands go to `product` directly."""

    def multiplied(*args: Any, **kwargs: Any) -> Tensor:
        operands = (*args, *kwargs.values())
        if len(operands) != 2 or not any(map(_is_sparse, operands)):
            return product(*args, **kwargs)
        (left, d_left), (right, d_right) = map(unpacked, operands)
        output = product(left, right)
        terms = [] if d_left is None else [product(d_left, right)]
        terms += [] if d_right is None else [product(left, d_right)]
        return forward_ad.make_dual(output, sum(terms[1:], terms[0])) if terms else output

    return multiplied


def dual_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, with its bias, likewise."""
    if not is_sparse(input):
        return F.linear(input, weight, bias)
    output = dual_product(torch.matmul)(input, weight.t())
    return output if bias is None else output + bias


def dual_sum(addition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.addmm` and similar, beta C + alpha A B, likewise."""

    def added(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        if not is_sparse(mat1):
            return addition(input, mat1, mat2, beta=beta, alpha=alpha)
        return beta * input + alpha * dual_product(torch.matmul)(mat1, mat2)

    return added


def _is_sparse(operand: Any) -> bool:
    return isinstance(operand, Tensor) and is_sparse(operand)
