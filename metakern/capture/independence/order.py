"""Checks with losses scaled by powers of two: rows line up with examples in this pass, and gradients are linear.

Powers of two cause no rounding, so output gradients B must scale exactly, up to sums in another order. Exceptions are
functions whose backward pass is not a product: `logcumsumexp` takes logarithms of gradients, `matrix_exp` a series.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.capture.graph import nodes_of, output_gradients
from metakern.capture.record import Trace
from metakern.capture.refusal import EngineUnavailable

Grads = Sequence[Sequence[Tensor | None]]


def require_order(trace: Trace, axes: Sequence[Sequence[Any]]) -> None:
    """Raise unless every row of this pass belongs to its own example only: scaled losses must scale B equally.

    A row into which another example mixes is detected unless its share is lost in rounding. Each pass separates
    examples whose numbers differ in one digit.
    """
    plain = output_gradients(trace, retain_graph=True)
    numbers, left = torch.arange(trace.examples, device=trace.losses.device), trace.examples
    base = 4 if _in_float16(plain) else 32
    while left > 1:
        scales = torch.exp2(-(numbers % base).to(trace.losses.dtype))  # downwards: float16 has no room above
        scaled = output_gradients(trace, scales, retain_graph=True)
        for use, line, before, after in zip(trace.uses, axes, plain, scaled):
            for axis, b, c in zip(line, before, after):
                if b is None or c is None or not b.numel():  # an expert without tokens has no rows
                    continue
                if _same(trace, b, c / axis.spread(scales, b.shape).to(b.dtype)):
                    continue
                raise EngineUnavailable(
                    f"rows of {use.name} are picked or ordered by data, and do not line up with the losses of this "
                    "batch; engine='jvp' is exact"
                )
        numbers, left = numbers // base, -(-left // base)


def require_linear(trace: Trace, plain: Grads) -> None:
    """Raise unless the output gradients scale with the losses, all scaled by the same large factor.

    If gradients are clipped, normalised or disturbed in the backward pass, they are not derivatives of the losses, and
    dots and weighted gradient would refer to different things. The error is not EngineUnavailable, since no other
    engine is to be tried: forward mode would see nothing of it.
    """
    scale = 1 / 16 if _in_float16(plain) else 2.0**24
    scaled = output_gradients(trace, torch.full_like(trace.losses, scale), retain_graph=True)
    for use, before, after in zip(trace.uses, plain, scaled):
        for b, c in zip(before, after):
            if b is not None and c is not None and not _same(trace, b, c / scale):
                raise NotImplementedError(
                    f"the gradient of the output of {use.name} does not scale with the losses: a hook, or the backward "
                    "of a custom autograd.Function, clips it, normalises it or adds to it, so there is no gradient per "
                    "example; do that to the gradient of the parameters after the step instead"
                )


def _in_float16(grads: Grads) -> bool:
    return any(b is not None and b.dtype == torch.float16 for line in grads for b in line)


_SUMS = 8
"""Allowed error of sums in another order, in units of the dtype's eps."""
_ROUGH = ("Logcumsumexp", "LinalgMatrixExp")
_ROUGHLY = 2.0**-8
"""Error allowed for these, relative to the largest entry; clipping and normalising are off by far more at 2^24."""


def _same(trace: Trace, b: Tensor, unscaled: Tensor) -> bool:
    """Equal up to rounding."""
    if not b.numel():
        return True
    number = torch.finfo(b.dtype)
    error, largest = (unscaled - b).abs(), b.abs().max()
    if bool((error <= _SUMS * number.eps * largest + number.tiny).all()):
        return True
    rough = any(node.name().startswith(_ROUGH) for node in nodes_of(trace.losses))
    return rough and bool((error <= _ROUGHLY * largest).all())
