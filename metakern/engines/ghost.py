"""The five stages: one forward and backward pass per batch, nothing differentiated twice.

Exact wherever the loss of one example does not depend on other examples; capture checks that and refuses otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakern import dots as stage_dots
from metakern.capture import trace_batch
from metakern.capture.graph import require_complete
from metakern.capture.independence.examples import ExampleAxis
from metakern.capture.record import Record, Trace
from metakern.engines.problem import Answer, Problem
from metakern.engines.recorded import Names, recorded, require_unchanged


class GhostPass:
    """The pass of the train batch whose dots and gradients come from the records of its uses."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self.records = problem, recorded(problem, fold=problem.chosen)
        self.losses = self.records.losses

    def dots(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self.records.dots_along(self._problem.by_identity(direction))

    def weighted_gradient(self, weights: Tensor, keep: bool = False, only: Names | None = None) -> dict[str, Tensor]:
        return self.records.weighted_gradient(weights, keep, only)


class Meta(NamedTuple):
    """Results of the meta batch's pass: V, or records for the weights whose dots take the pairs form."""

    loss: Tensor
    direction: dict[int, Tensor]
    paired: dict[int, Record]  # index of the train use -> meta record
    whole: dict[int, Tensor]  # all of V, if requested


def solve(problem: Problem) -> Answer:
    """Dots along the meta gradient, by pairs where that is cheaper, and, on demand, the weighted gradient.

    Raises:
        EngineUnavailable: examples interact, or a parameter is used where tracing cannot see it.
    """
    train = recorded(problem)
    meta = _meta_pass(problem, train.trace, whole=train.expected is not None)
    dots = train.dots_along(meta.direction, meta.paired)
    if train.expected is not None and meta.paired:
        train.expected.require_same(dots, train.dots_along(meta.whole), meta.whole.values(), "a dot by pairs")
    return Answer(dots, train.losses, meta.loss, train.weighted_gradient)


def _meta_pass(problem: Problem, trace: Trace, whole: bool) -> Meta:
    candidates = pair_candidates(problem, trace)
    if not candidates:
        loss, gradient = problem.meta_gradient()
        return Meta(loss, problem.by_identity(gradient), {}, {})
    with problem.writes.meta_pass():
        meta = problem.model, problem.meta_batch, problem.loss_fn, problem.trainable
        meta_trace = trace_batch(*meta, "meta_batch", rows=False)
        return meta_gradients(problem, trace, meta_trace, candidates, whole)


def pair_candidates(problem: Problem, trace: Trace) -> dict[int, int]:
    """Identity of a weight that may take the pairs form -> its use; empty if tracing would cost more than it saves."""
    if problem.process_group is not None:
        return {}
    candidates = stage_dots.pairable(trace, problem.chosen_by_identity)
    return candidates if stage_dots.worth_tracing(trace, candidates.values(), problem.meta_share) else {}


def meta_gradients(
    problem: Problem, trace: Trace, meta_trace: Trace, candidates: dict[int, int], whole: bool = False
) -> Meta:
    """The backward pass of the meta batch: meta records for weights whose pairs form is cheaper, V for all others;
    with `whole`, V for all parameters as well.
    """
    pairs = _pairs(problem, trace, meta_trace, candidates)
    loss = meta_trace.losses.mean()
    directed = [p for key, p in problem.chosen_by_identity.items() if whole or key not in pairs]
    edges: list[Any] = [meta_trace.uses[j].edges[0] for _, j in pairs.values()]
    found = torch.autograd.grad(loss, [*directed, *edges], allow_unused=True)
    every = {id(p): g.to_dense() if g.is_sparse else g for p, g in zip(directed, found) if g is not None}
    direction = {key: v for key, v in every.items() if key not in pairs}
    paired = {}
    for (k, j), grad in zip(pairs.values(), found[len(directed) :]):
        if grad is not None:
            require_unchanged(meta_trace.uses[j])
            paired[k] = Record(meta_trace.uses[j], (grad,), (ExampleAxis(0, 1, grad.shape[0]),))
    return Meta(loss.detach(), direction, paired, every if whole else {})


def _pairs(problem: Problem, trace: Trace, meta_trace: Trace, candidates: dict[int, int]) -> dict[int, tuple[int, int]]:
    """Identity of a weight -> its use in the train pass and in the meta pass, where the pairs form is cheaper."""
    meta_candidates = stage_dots.pairable(meta_trace, problem.chosen_by_identity)
    pairs = {
        key: (k, meta_candidates[key])
        for key, k in candidates.items()
        if key in meta_candidates and stage_dots.pairs_are_cheaper(trace.uses[k], meta_trace.uses[meta_candidates[key]])
    }
    if pairs:  # a use of these weights that the trace does not know would be missing from the Grams
        require_complete(meta_trace, {key: name for name, p in problem.chosen.items() if (key := id(p)) in pairs})
    return pairs
