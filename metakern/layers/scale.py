"""Y = x * s entry by entry, with s broadcast: LayerScale, gates, normalisations written by hand (RMSNorm of LLMs).

If s is small compared with an example's part of Y, per-example gradients are formed as soon as B is known, and x and B
are freed: G_n = sum of B_n * x_n over the dimensions that s is broadcast along. Otherwise the generic rule applies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metakern.capture.record import Call, Record
from metakern.layers import generic
from metakern.layers.rule import Gradients, LayerRule

PRODUCTS = (
    *(torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply),
    *(torch.Tensor.__mul__, torch.Tensor.__rmul__),
)
SMALL = 4
"""How many times as large as all per-example gradients the output must be."""


def _applies(call: Call) -> bool:
    strided = (isinstance(factor, Tensor) and factor.layout == torch.strided for factor in _factors(call))
    return len(call.parameters) == 1 and all(strided)


def _factors(call: Call) -> tuple[Any, Any]:
    return call.argument(0, "input"), call.argument(1, "other")


def per_example(record: Record, examples: int) -> Gradients | None:
    """G_n by the parameter, [n, its entries]; None if it is not small, or has separate entries for examples."""
    ((_, scale),) = record.call.parameters
    first, second = _factors(record.call)
    x, grad, axis = second if first is scale else first, record.output_grad, record.axes[0]
    sizes = (*(1 for _ in range(grad.dim() - scale.dim())), *scale.shape)
    if SMALL * scale.numel() * examples > grad.numel() or sizes[axis.dim] != 1:
        return None
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    product = axis.folded(grad.to(dtype) * x.detach().to(dtype), examples).movedim(axis.dim + 1, 0)
    # Two factors of the examples' dimension remain in its place.
    summed = [size == 1 for size in (*sizes[: axis.dim], 1, 1, *sizes[axis.dim + 1 :])]
    return {id(scale): product.sum([d + 1 for d, yes in enumerate(summed) if yes]).reshape(examples, -1)}


RULE = LayerRule(_applies, generic.dots, generic.weighted_grads, per_example=per_example, by_example=True)
