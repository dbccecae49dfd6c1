"""Stage 1: one forward and backward pass; for each use of a parameter, its inputs A and output gradients B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from metakern.capture.losses import LossFunction, evaluate_losses, require_losses
from metakern.capture.members import constants_of
from metakern.capture.record import Record as Record
from metakern.capture.record import Trace as Trace
from metakern.capture.refusal import EngineUnavailable as EngineUnavailable
from metakern.capture.state.writes import Writes
from metakern.capture.trace import Tracer
from metakern.capture.whole_modules import registered_modules_as_wholes


def trace_batch(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None,
    trainable: Mapping[str, nn.Parameter],
    argument: str,
    writes: Writes | None = None,
    rows: bool = True,
) -> Trace:
    """Run one batch forward and record every use of a trainable parameter; `writes` notes what the pass overwrites.

    If only sums over the batch are wanted, `rows=False` skips tracking which rows belong to which example.
    """
    tracer = Tracer(trainable.values(), constants_of(model), writes, rows)
    # If the model calls autograd in its forward pass on a GPU, another thread would run that. Each thread numbers its
    # own nodes, so these would look older than this pass.
    one_thread = torch.autograd.set_multithreading_enabled
    with one_thread(False), registered_modules_as_wholes(model, tracer), tracer:
        losses = evaluate_losses(model, batch, loss_fn, argument)
    require_losses(losses, argument)
    if writes is not None:
        writes.seen_pass = True
    return tracer.trace(losses)
