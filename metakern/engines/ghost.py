"""The five stages: one forward and backward per batch, no second differentiation, no per-example gradient.

Exact wherever the loss of one example does not depend on other examples; capture checks that and refuses otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metakern import dots as stage_dots
from metakern.capture import trace_batch
from metakern.capture.examples import ExampleAxis, example_axes
from metakern.capture.graph import output_gradients, require_complete, visit_output_gradients
from metakern.capture.record import BatchRecord, Record, Trace, Use
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state import unchanged_buffers
from metakern.engines.group import mean_over_group
from metakern.engines.problem import Answer, Problem
from metakern.engines.weighted_backward import weighted_backward
from metakern.layers.rule import Tangents
from metakern.weighted_grad import weighted_gradients

Axes = list[list[ExampleAxis]]


class _Meta(NamedTuple):
    """The meta batch as the dots need it: V where it was formed, records where the pairs form takes its place."""

    loss: Tensor
    direction: dict[int, Tensor]
    paired: dict[int, Record]  # index of the train use -> meta record


def solve(problem: Problem) -> Answer:
    """Dots and, on demand, the weighted gradient of a batch.

    Raises:
        EngineUnavailable: examples interact, or a parameter is used where tracing cannot see it.
    """
    trace = _trace(problem)
    axes = example_axes(problem.model, trace, problem.context)
    meta = _meta_pass(problem, trace)
    if problem.memory == "two_pass":
        return _two_pass(problem, trace, axes, meta)
    records = [_record(use, grads, line) for use, grads, line in zip(trace.uses, output_gradients(trace), axes)]
    batch = BatchRecord(trace.losses.detach(), [r for r in records if r is not None], trace.derivations)
    _require_participation(problem, trace, [r is not None for r in records])
    tangents = stage_dots.extend_to_derived(meta.direction, trace.derivations)
    total = _Total(trace)
    for k, record in enumerate(records):
        if record is not None:
            total.add(record, meta.paired.get(k), tangents)
    return Answer(
        total.dots, batch.losses, meta.loss, lambda weights: weighted_gradients(batch, weights, problem.trainable)
    )


def _two_pass(problem: Problem, trace: Trace, axes: Axes, meta: _Meta) -> Answer:
    """Each B is used as it comes by and dropped; the weighted gradient is a second backward over the same graph."""
    tangents = stage_dots.extend_to_derived(meta.direction, trace.derivations)
    total, reached = _Total(trace), [False] * len(trace.uses)

    def visit(k: int, grads: list[Tensor | None]) -> None:
        record = _record(trace.uses[k], grads, axes[k])
        if record is not None:
            reached[k] = True
            with torch.no_grad():
                total.add(record, meta.paired.get(k), tangents)

    visit_output_gradients(trace, visit)
    _require_participation(problem, trace, reached)

    losses = trace.losses
    return Answer(
        total.dots, losses.detach(), meta.loss, lambda weights: weighted_backward(problem, losses, weights)
    )


def _trace(problem: Problem) -> Trace:
    trace = trace_batch(problem.model, problem.batch, problem.loss_fn, problem.trainable, "batch")
    if trace.couplings and trace.examples > 1:
        raise EngineUnavailable(
            f"examples interact: {trace.couplings[0]}; put the model's normalisation in eval mode, or use engine='jvp'"
        )
    require_complete(trace, {id(p): name for name, p in problem.trainable.items()})
    return trace


def _meta_pass(problem: Problem, trace: Trace) -> _Meta:
    chosen = {id(p): p for p in problem.chosen.values()}
    candidates = {} if problem.process_group is not None else stage_dots.pairable(trace, chosen)
    with unchanged_buffers(problem.model):
        meta_trace = trace_batch(problem.model, problem.meta_batch, problem.loss_fn, problem.trainable, "meta_batch")
    meta_candidates = stage_dots.pairable(meta_trace, chosen) if candidates else {}
    pairs = {
        key: (k, meta_candidates[key])
        for key, k in candidates.items()
        if key in meta_candidates
        and stage_dots.pairs_are_cheaper(trace.uses[k], meta_trace.uses[meta_candidates[key]])
    }
    loss = meta_trace.losses.mean()
    directed = [p for key, p in chosen.items() if key not in pairs]
    edges = [meta_trace.uses[j].edges[0] for _, j in pairs.values()]
    found = torch.autograd.grad(loss, [*directed, *edges], allow_unused=True)
    direction = {id(p): g for p, g in zip(directed, found) if g is not None}
    mean_over_group(direction, problem.process_group)
    paired = {}
    for (k, j), grad in zip(pairs.values(), found[len(directed) :]):
        if grad is not None:
            paired[k] = Record(meta_trace.uses[j], (grad,), (ExampleAxis(0, 1, grad.shape[0]),))
    return _Meta(loss.detach(), direction, paired)


def _record(use: Use, grads: list[Tensor | None], axes: list[ExampleAxis]) -> Record | None:
    """The use with its B; None where the losses do not depend on it."""
    if all(g is None for g in grads):
        return None
    for tensor, version in use.call.versions:
        if tensor._version != version:
            raise EngineUnavailable(
                f"the input of {use.name} (shape {tuple(tensor.shape)}) was overwritten in place after it was read, so "
                "its dots would be wrong; make that operation out of place, or use engine='jvp'"
            )
    return Record(use, tuple(grads), tuple(axes))


class _Total:
    """The running sum of the dots over the uses of a pass."""

    def __init__(self, trace: Trace) -> None:
        self.dots = torch.zeros(trace.examples, dtype=_sum_dtype(trace.losses), device=trace.losses.device)

    def add(self, record: Record, meta_record: Record | None, tangents: Tangents) -> None:
        n = self.dots.shape[0]
        if meta_record is not None:
            self.dots += stage_dots.pair_dots(record, meta_record, n)
        term = stage_dots.direction_dots(record, tangents, n)
        if term is not None:
            self.dots += term


def _sum_dtype(losses: Tensor) -> torch.dtype:
    return torch.float64 if losses.dtype == torch.float64 else torch.float32


def _require_participation(problem: Problem, trace: Trace, reached: list[bool]) -> None:
    """Every trainable parameter must have a use that the losses depend on, its own or through a derived tensor."""
    known = {id(p) for use, yes in zip(trace.uses, reached) if yes for _, p in use.call.parameters}
    for call in reversed(trace.derivations):
        if any(t is not None and id(t) in known for t in call.outputs):
            known.update(id(p) for _, p in call.parameters)
    problem.require_participation(known)
