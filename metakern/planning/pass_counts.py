"""FLOPs of the passes that a step takes over whole batches, as torch counts them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from metakern.capture import Trace, trace_batch
from metakern.capture.graph import output_gradients
from metakern.capture.state.buffers import unchanged_buffers
from metakern.engines import ghost
from metakern.engines.jvp import DualPass
from metakern.engines.problem import Problem
from metakern.engines.recorded import Recorded
from metakern.engines.train_pass import answered
from metakern.engines.weighted_backward import weighted_backward
from metakern.planning.peak_memory import later_step


class Passes(NamedTuple):
    """FLOPs. By ghost, `backward` gives output gradients B, but no gradients of parameters; by forward mode, both."""

    forward: int
    backward: int
    meta: int  # forward and backward of the meta batch
    dual: int = 0  # forward mode's second pass over the train batch
    opening: int = 0  # recurrent layers once more, step by step, for B of the products in them
    plain: int = 0  # a plain step as a whole, if it has recurrent layers, whose gradients are not formed by use

    def times(self, parts: float, meta_parts: float) -> Passes:
        """Scaled to so many times as many examples of batch and meta batch."""
        return Passes(*(round((meta_parts if k == 2 else parts) * flops) for k, flops in enumerate(self)))


NONE = Passes(0, 0, 0)


class _Whole:
    """Replaces the counter's module tracker, whose hooks on a graph do not allow a backward pass to chosen tensors."""

    parents = frozenset(("Global",))

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _layer(inputs: Any, *weights: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * math.prod(inputs[:-1]) * sum(map(math.prod, weights[:2]))


def _layer_backward(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """To inputs and weights."""
    return 2 * _layer(*shapes)


def _sum_of_products(term: Any, a: Any, b: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * math.prod(a) * b[-1]


_FURTHER = {
    torch.ops.aten.mkldnn_rnn_layer: _layer,
    torch.ops.aten.mkldnn_rnn_layer_backward: _layer_backward,
    torch.ops.aten.baddbmm_: _sum_of_products,
}
"""Operators that torch's counter does not know: an LSTM on a CPU, which is a single one, and an in-place sum."""


def counter() -> FlopCounterMode:
    """Counts products as torch's counter does, and those that it does not know."""
    found = FlopCounterMode(display=False, custom_mapping=_FURTHER)
    found.mod_tracker = _Whole()  # pyright: ignore
    return found


def by_ghost(problem: Problem, pairs: bool = True, opened: bool = False) -> Passes:
    """The passes of a ghost step over both batches.

    Args:
        pairs: whether weights may be handled in pairs form; without, all of V is formed.
        opened: whether recurrent layers are opened into products.
    """

    def traced(batch: Any, argument: str) -> Trace:
        return trace_batch(problem.model, batch, problem.loss_fn, problem.trainable, argument)

    with counter() as forward:
        trace = traced(problem.batch, "batch")
    with counter() as backward:
        output_gradients(trace)
    with counter() as meta:
        candidates = ghost.pair_candidates(problem, trace) if pairs else {}
        ghost.meta_gradients(problem, trace, traced(problem.meta_batch, "meta_batch"), candidates)
    passes = Passes(*(each.get_total_flops() for each in (forward, backward, meta)))
    return _with_recurrent_layers(problem, passes) if opened else passes


def _with_recurrent_layers(problem: Problem, passes: Passes) -> Passes:
    with counter() as opened:
        Recorded(later_step(problem))
    with counter() as plain:
        losses = problem.batch_losses()
        weighted_backward(problem, losses, torch.ones_like(losses), only=problem.trainable)
    opening = opened.get_total_flops() - passes.forward - passes.backward
    return passes._replace(opening=opening, plain=plain.get_total_flops())


def by_forward_mode(problem: Problem) -> Passes:
    """The passes of a step by forward mode.

    Raises: EngineUnavailable if forward mode does not support the model either.
    """
    with unchanged_buffers(problem.model):
        with counter() as forward:
            problem.batch_losses()
        losses = problem.batch_losses()
    with counter() as backward:
        weighted_backward(problem, losses, torch.ones_like(losses))
    with counter() as meta:
        problem.meta_gradient()
    with unchanged_buffers(problem.model):
        answered(DualPass(problem), problem)  # the first run is checked against autograd, which is not to be counted
    with counter() as both:
        answered(DualPass(problem), problem)
    first, second, third = (each.get_total_flops() for each in (forward, backward, meta))
    return Passes(first, second, third, both.get_total_flops() - first - third)
