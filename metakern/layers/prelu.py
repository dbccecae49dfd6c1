"""PReLU: Y = x where x > 0, else s x, with a slope for each channel or one for all.

Per-example gradients are formed as soon as B is known, and x and B are freed: G_n = sum_t B_nt min(x_nt, 0).
"""

from __future__ import annotations

import torch

from metakern.capture.record import Call, Record
from metakern.layers import generic
from metakern.layers.rule import Gradients, LayerRule

FUNCTIONS = (torch.prelu, torch.Tensor.prelu)


def _applies(call: Call) -> bool:
    return len(call.parameters) == 1 and call.parameter(1, "weight") is not None


def per_example(record: Record, examples: int) -> Gradients | None:
    """G_n by the parameter, [n, slopes]; None unless examples come first, one entry each."""
    axis, grad, ((_, slope),) = record.axes[0], record.output_grad, record.call.parameters
    if not axis.leading or axis.inner != 1 or (slope.numel() > 1 and grad.dim() < 2):
        return None
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    product = grad.to(dtype) * record.call.argument(0, "input").detach().to(dtype).clamp_max(0)
    channels = (examples, slope.numel(), -1) if slope.numel() > 1 else (examples, 1, -1)
    return {id(slope): product.reshape(channels).sum(2)}


RULE = LayerRule(_applies, generic.dots, generic.weighted_grads, per_example=per_example, by_example=True)
