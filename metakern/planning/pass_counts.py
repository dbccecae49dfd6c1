"""FLOPs of the passes that a step takes over whole batches, as torch counts them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from metakern.capture import Trace, trace_batch
from metakern.capture.graph import output_gradients
from metakern.capture.state import unchanged_buffers
from metakern.engines import ghost, jvp
from metakern.engines.problem import Problem
from metakern.engines.weighted_backward import weighted_backward


class Passes(NamedTuple):
    """By ghost, backward is to the output gradients B, without gradients of parameters; by forward mode it is whole."""

    forward: int
    backward: int
    meta: int  # forward and backward of the meta batch
    dual: int = 0  # forward mode's second pass over the train batch


NONE = Passes(0, 0, 0)


def by_ghost(problem: Problem, meta: Trace, pairs: bool = True) -> Passes:
    """The passes of a ghost step over the train batch and the traced meta batch; without `pairs` it forms all of V."""

    def traced(batch: Any, argument: str) -> Trace:
        return trace_batch(problem.model, batch, problem.loss_fn, problem.trainable, argument)

    # A pass that was counted forward is not run backward: the counter leaves hooks that chosen leaves do not stand.
    with FlopCounterMode(display=False) as forward:
        traced(problem.batch, "batch")
    with FlopCounterMode(display=False) as meta_forward:
        traced(problem.meta_batch, "meta_batch")
    trace = traced(problem.batch, "batch")
    with FlopCounterMode(display=False) as backward:
        output_gradients(trace)
    candidates = ghost.pair_candidates(problem, trace) if pairs else {}
    with FlopCounterMode(display=False) as meta_backward:
        ghost.meta_gradients(problem, trace, meta, candidates)
    counts = [each.get_total_flops() for each in (forward, backward, meta_forward, meta_backward)]
    return Passes(counts[0], counts[1], counts[2] + counts[3])


def by_forward_mode(problem: Problem) -> Passes:
    """The passes of a step by forward mode.

    Raises: EngineUnavailable where it does not serve either.
    """
    with unchanged_buffers(problem.model):
        with FlopCounterMode(display=False) as forward:
            problem.batch_losses()
        losses = problem.batch_losses()
    with FlopCounterMode(display=False) as backward:
        weighted_backward(problem, losses, torch.ones_like(losses))
    with FlopCounterMode(display=False) as meta:
        problem.meta_gradient()
    with unchanged_buffers(problem.model):
        jvp.solve(problem)  # the first is held against autograd, which is not counted
    with FlopCounterMode(display=False) as both:
        jvp.solve(problem)
    first, second, third = (each.get_total_flops() for each in (forward, backward, meta))
    return Passes(first, second, third, both.get_total_flops() - first - third)
