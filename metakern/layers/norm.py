"""The affine part of normalisations: Y = x^ * gamma + beta, with x^ the normalised input of the call itself.

Per-example gradients are formed, because they are small: G_n = sum_t B_nt x^_nt and H_n = sum_t B_nt have one entry
per channel. dots_n = <G_n, V> + <H_n, v>, and the weighted gradients are sum_n w_n G_n and sum_n w_n H_n, so the
activations are read once for both, as soon as B is known, and freed. Layer, group, instance and RMS normalisation
take their statistics per example; batch normalisation only if they are frozen (capture rejects it otherwise).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern import ops
from metakern.capture.record import Call, Record
from metakern.layers.per_example import along, weighted
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights, require_apart


class _Norm(NamedTuple):
    """Positions of the affine parameters in a call, and the normalisation without them."""

    weight: int
    bias: int | None
    normalise: Callable[[Call, Tensor], Tensor]
    channels_first: bool  # parameters lie along dimension 1; otherwise along the last dimensions


def _instance(call: Call, x: Tensor) -> Tensor:
    over_input = call.argument(5, "use_input_stats", True)
    mean, var = _statistics(call, x, own=over_input)
    return F.instance_norm(x, mean, var, use_input_stats=over_input, eps=call.argument(7, "eps", 1e-5))


def _batch(call: Call, x: Tensor) -> Tensor:
    """With its own statistics in training mode, which occurs for a batch of one example only."""
    training = call.argument(5, "training", False)
    mean, var = _statistics(call, x, own=training)
    return F.batch_norm(x, mean, var, training=training, eps=call.argument(7, "eps", 1e-5))


def _statistics(call: Call, x: Tensor, own: bool) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics in the precision of x, unless x is normalised by its own."""
    if own:
        return None, None
    return call.argument(1, "running_mean").to(x.dtype), call.argument(2, "running_var").to(x.dtype)


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


def per_example_gradients(record: Record, examples: int) -> Gradients:
    """Identity of an affine parameter -> its gradient for every example, [n, channels]."""
    weight, bias = _parameters(record.call)
    grad = record.output_grad
    if weight is not None and record.call.func in (F.layer_norm, F.rms_norm):
        return _by_rows(record, weight, bias, examples)
    grad = grad if grad.dtype == torch.float64 else grad.float()
    by_channel, found = _by_channel(record, grad, examples), Gradients()
    if weight is not None:
        x = record.call.argument(0, "input").detach().to(grad.dtype)
        normalised = _by_channel(record, NORMS[record.call.func].normalise(record.call, x), examples)
        found[id(weight)] = _sum_positions(record.call, normalised, by_channel)
    if bias is not None:
        found[id(bias)] = _sum_positions(record.call, None, by_channel)
    return found


def _by_rows(record: Record, weight: Tensor, bias: Tensor | None, examples: int) -> Gradients:
    """The same for layer and RMS normalisation, which normalise every row: in one pass, by `ops.affine_grads`."""
    call, grad = record.call, record.output_grad
    x = call.argument(0, "input").detach()
    centred = call.func is F.layer_norm
    eps = call.argument(4, "eps", 1e-5) if centred else call.argument(3, "eps")
    if eps is None:  # as in F.rms_norm: that of the dtype in which it computes
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    rows = _by_channel(record, x.to(grad.dtype), examples), _by_channel(record, grad, examples)
    scale, shift = ops.affine_grads(*rows, eps=eps, centred=centred, shift=bias is not None)
    return {id(weight): scale} if bias is None else {id(weight): scale, id(bias): shift}


def _by_channel(record: Record, tensor: Tensor, examples: int) -> Tensor:
    """[n, channels, positions] where channels come first, [n, positions, channels] where they come last."""
    axis, affine = record.axes[0], next(p for p in _parameters(record.call) if p is not None)
    first = NORMS[record.call.func].channels_first
    require_apart(record, examples, *((1,) if first else range(-affine.dim(), 0)))
    folded = axis.folded(tensor, examples).movedim(axis.dim + 1, 0)
    if first:
        return folded.movedim(3 if axis.dim == 0 else 2, 1).reshape(examples, tensor.shape[1], -1)
    return folded.reshape(examples, -1, affine.numel())


def _sum_positions(call: Call, normalised: Tensor | None, grad: Tensor) -> Tensor:
    if NORMS[call.func].channels_first:
        if normalised is None:
            return grad.sum(-1)
        if grad.stride(1) == 1 < grad.stride(2) and grad.dtype in (torch.float32, torch.float64):
            return (normalised * grad).sum(-1)  # channels_last: rows of positions would be copies
        return ops.row_dots(normalised.flatten(0, 1), grad.flatten(0, 1)).view(grad.shape[:2])
    return (grad if normalised is None else grad * normalised).sum(1)


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    return along(per_example_gradients(record, examples), tangents)


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    return weighted(per_example_gradients(record, weights.examples), weights)


RULE = LayerRule(_applies, dots, weighted_grads, per_example=per_example_gradients, by_example=True)
