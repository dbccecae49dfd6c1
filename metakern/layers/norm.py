"""The affine part of normalisations: Y = x^ * gamma + beta, with x^ the normalised input of the call itself.

dots_n = <B_n, x^_n * V + v>; weighted gradients sum_n w_n B_n x^_n and sum_n w_n B_n. Layer, group, instance and RMS
normalisation take their statistics per example; batch normalisation only when its statistics are frozen (capture
refuses it otherwise).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.capture.record import Call, Record
from metakern.layers.inner import per_example_inner
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights


class _Norm(NamedTuple):
    """Positions of the affine parameters in a call, and the normalisation without them."""

    weight: int
    bias: int | None
    normalise: Callable[[Call, Tensor], Tensor]
    channels_first: bool  # parameters lie along dimension 1; otherwise along the last dimensions


def _instance(call: Call, x: Tensor) -> Tensor:
    over_input = call.argument(5, "use_input_stats", True)
    mean, var = (None, None) if over_input else (call.argument(1, "running_mean"), call.argument(2, "running_var"))
    return F.instance_norm(x, mean, var, use_input_stats=over_input, eps=call.argument(7, "eps", 1e-5))


def _batch(call: Call, x: Tensor) -> Tensor:
    mean, var = call.argument(1, "running_mean"), call.argument(2, "running_var")
    return F.batch_norm(x, mean, var, training=False, eps=call.argument(7, "eps", 1e-5))


NORMS: dict[Any, _Norm] = {
    F.layer_norm: _Norm(
        2, 3, lambda c, x: F.layer_norm(x, c.argument(1, "normalized_shape"), eps=c.argument(4, "eps", 1e-5)), False
    ),
    F.rms_norm: _Norm(
        2, None, lambda c, x: F.rms_norm(x, c.argument(1, "normalized_shape"), eps=c.argument(3, "eps")), False
    ),
    F.group_norm: _Norm(
        2, 3, lambda c, x: F.group_norm(x, c.argument(1, "num_groups"), eps=c.argument(4, "eps", 1e-5)), True
    ),
    F.instance_norm: _Norm(3, 4, _instance, True),
    F.batch_norm: _Norm(3, 4, _batch, True),
}


def _applies(call: Call) -> bool:
    return all(path.key in ("weight", "bias") or path.key in _positions(call) for path, _ in call.parameters)


def _positions(call: Call) -> tuple[int | None, ...]:
    norm = NORMS[call.func]
    return norm.weight, norm.bias


def _parameters(call: Call) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = _positions(call)
    assert weight is not None
    return call.parameter(weight, "weight"), None if bias is None else call.parameter(bias, "bias")


def _normalised(call: Call, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    x = call.argument(0, "input").detach().to(dtype)
    return NORMS[call.func].normalise(call, x if rows is None else x[rows])


def _aligned(call: Call, parameter: Tensor, dim: int) -> Tensor:
    """An affine parameter, broadcastable against the output."""
    if NORMS[call.func].channels_first:
        return parameter.view(1, -1, *(1,) * (dim - 2))
    return parameter


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    call, grad = record.call, record.output_grad
    weight, bias = _parameters(call)
    v = None if weight is None else tangents.get(id(weight))
    vb = None if bias is None else tangents.get(id(bias))
    response = None if v is None else _normalised(call, grad.dtype) * _aligned(call, v.to(grad.dtype), grad.dim())
    if vb is not None:
        shift = _aligned(call, vb.to(grad.dtype), grad.dim())
        response = shift.expand_as(grad) if response is None else response.add_(shift)
    assert response is not None
    return per_example_inner(response, grad, record.axes[0], examples)


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    call, grad, axis = record.call, record.output_grad, record.axes[0]
    weight, bias = _parameters(call)
    rows = weights.kept if axis.leading and axis.inner == 1 else None
    if rows is None:
        scaled = grad * axis.spread(weights.values, grad.shape).to(grad.dtype)
    else:
        scaled = grad[rows] * weights.values[rows].view(-1, *(1,) * (grad.dim() - 1)).to(grad.dtype)
    found: Gradients = {}
    if weight is not None:
        found[id(weight)] = _sum_to(call, scaled * _normalised(call, grad.dtype, rows), weight)
    if bias is not None:
        found[id(bias)] = _sum_to(call, scaled, bias)
    return found


def _sum_to(call: Call, tensor: Tensor, parameter: Tensor) -> Tensor:
    return tensor.sum_to_size(_aligned(call, parameter, tensor.dim()).shape).view(parameter.shape)


RULE = LayerRule(_applies, dots, weighted_grads)
