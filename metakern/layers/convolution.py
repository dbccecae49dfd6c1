"""conv1d to conv3d, and transposed: linear in the kernel, so dots_n = <B_n, conv(A_n; V, v)> by the library's own call.

The weighted gradient is the library's kernel gradient over examples of non-zero weight. For a transposed convolution it
is that of the plain convolution from Y to A, with B as its input and A as its output gradient. Passes that need several
results form per-example kernel gradients instead if these are small, at the cost of one result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern import ops
from metakern.capture.record import Call, Record
from metakern.layers.inner import per_example_inner
from metakern.layers.per_example import cheaper
from metakern.layers.precision import lowered
from metakern.layers.replay import parameter_gradients
from metakern.layers.rule import Gradients, LayerRule, Tangents, Weights
from metakern.ops.layout import examples_per_chunk

PLAIN = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


def _applies(call: Call) -> bool:
    return all(path.key not in (0, "input") for path, _ in call.parameters) and call.argument(1, "weight") is not None


def dots(record: Record, tangents: Tangents, examples: int) -> Tensor:
    call, axis = record.call, record.axes[0]
    (grad,) = lowered(record.dot_precision, record.output_grad)
    convolve = _along(call, tangents, grad.dtype)
    inputs = call.argument(0, "input").detach().to(grad.dtype)
    if not (axis.leading and _batched(call) and inputs.shape[0] == examples):
        return per_example_inner(convolve(inputs), grad, axis, examples)
    chunk = examples_per_chunk(inputs, grad)
    terms = [
        per_example_inner(convolve(some), b, axis, b.shape[0])
        for some, b in zip(inputs.split(chunk), grad.split(chunk))
    ]
    return terms[0] if len(terms) == 1 else torch.cat(terms)


def _along(call: Call, tangents: Tangents, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A -> conv(A; V, v): the call with every trainable tensor replaced by its direction, frozen ones by zero."""
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    v = tangents.get(id(weight)) if call.parameter(1, "weight") is not None else None
    vb = tangents.get(id(bias)) if call.parameter(2, "bias") is not None else None
    v = (torch.zeros_like(weight) if v is None else v).to(dtype)
    vb = None if vb is None else vb.to(dtype)
    options = {k: value for k, value in call.kwargs.items() if k not in ("input", "weight", "bias")}
    return lambda inputs: call.func(inputs, v, vb, *call.args[3:], **options)


def weighted_grads(record: Record, weights: Weights) -> Gradients:
    call, grad, axis = record.call, record.output_grad, record.axes[0]
    if not _by_example(record):
        scaled = grad * axis.spread(weights.values, grad.shape).to(grad.dtype)
        return parameter_gradients(call, (0,), (scaled,))
    weight, bias = call.parameter(1, "weight"), call.parameter(2, "bias")
    inputs, grads, kernel, settings = _operands(record)
    gradient = partial(ops.weighted_kernel_grad, inputs, grads, weights.values, kernel, *settings, kept=weights.nonzero)
    if call.func in PLAIN:
        found = gradient(bias=bias is not None)
        return {id(p): g for p, g in zip((weight, bias), found) if p is not None}
    total: Gradients = {}
    if weight is not None:
        total[id(weight)], _ = gradient(bias=False)
    if bias is not None:
        total[id(bias)] = torch.mv(_over_positions(grad).t(), weights.values.to(grad.dtype))
    return total


def per_example(record: Record, examples: int) -> Gradients | None:
    """Per-example kernel gradients; None if they are large, or with one input channel, where the library is slow."""
    weight, bias = record.call.parameter(1, "weight"), record.call.parameter(2, "bias")
    if weight is None or weight.shape[1] == 1 or not _by_example(record):
        return None
    inputs, grads, kernel, settings = _operands(record)
    if not cheaper(kernel, inputs, grads, examples):
        return None
    plain = record.call.func in PLAIN
    found, shift = ops.kernel_grads(inputs, grads, kernel, *settings, bias=plain and bias is not None)
    if not plain and bias is not None:
        shift = _over_positions(record.output_grad)
    return {id(p): g.flatten(1) for p, g in zip((weight, bias), (found, shift)) if p is not None and g is not None}


def _by_example(record: Record) -> bool:
    """Is every example an image of its own?"""
    axis = record.axes[0]
    return axis.leading and axis.inner == 1 and _batched(record.call)


def _batched(call: Call) -> bool:
    """Has the input a dimension of its own for examples? With groups, single images may have them as channels."""
    return call.argument(0, "input").dim() == call.argument(1, "weight").dim()


def _operands(record: Record) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    """Input and output gradient of the plain convolution, the kernel, and stride, padding, dilation and groups."""
    call, grad = record.call, record.output_grad
    transposed = call.func in TRANSPOSED
    dilation, groups = ((7, "dilation", 1), (6, "groups", 1)) if transposed else ((5, "dilation", 1), (6, "groups", 1))
    stride, padding, *spacing = (call.argument(*s) for s in ((3, "stride", 1), (4, "padding", 0), dilation, groups))
    inputs, kernel = call.argument(0, "input").detach().to(grad.dtype), call.argument(1, "weight").detach()
    if isinstance(padding, str):
        inputs, padding = _padded(inputs, padding, kernel, spacing[0])
    settings = (stride, padding, *spacing)
    return (grad, inputs, kernel, settings) if transposed else (inputs, grad, kernel, settings)


def _padded(inputs: Tensor, padding: str, kernel: Tensor, dilation: int | Sequence[int]) -> tuple[Tensor, list[int]]:
    """The input and the padding by numbers that "valid" and "same" stand for.

    "same" adds dilation * (k - 1) zeros to a dimension. An odd one goes behind the input, as torch has it.
    """
    sizes = kernel.shape[2:]
    if padding == "valid":
        return inputs, [0] * len(sizes)
    dilations = [dilation] * len(sizes) if isinstance(dilation, int) else dilation
    zeros = [d * (size - 1) for d, size in zip(dilations, sizes)]
    if any(z % 2 for z in zeros):
        inputs = F.pad(inputs, [end for z in reversed(zeros) for end in (0, z % 2)])
    return inputs, [z // 2 for z in zeros]


def _over_positions(grad: Tensor) -> Tensor:
    """B of every channel, [n, o]."""
    return grad.flatten(2).sum(2)


RULE = LayerRule(_applies, dots, weighted_grads, per_example=per_example)
