"""The train pass of the ghost engine: inputs A and output gradients B of every use, kept or used in passing."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metakern import dots as stage_dots
from metakern.capture import trace_batch
from metakern.capture.graph import require_complete, visit_output_gradients
from metakern.capture.independence.examples import Axes, ExampleAxis, example_axes
from metakern.capture.independence.poison import poisoned_losses
from metakern.capture.record import Record, Trace, Use
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.buffers import unchanged_buffers
from metakern.capture.state.gradients import nothing_added
from metakern.engines.agreement import Expected, expected
from metakern.engines.problem import Problem
from metakern.engines.weighted_backward import weighted_backward
from metakern.layers.rule import Tangents
from metakern.layers.table import rule_for
from metakern.weighted_grad import weighted_gradients

Names = Mapping[str, nn.Parameter]

NONE_PAIRED: Mapping[int, Record] = {}
NONE_FOLDED: Names = {}


class Recorded:
    """A and B of every use are kept, but no graph: any number of directions and weights, without a backward pass."""

    def __init__(self, problem: Problem, fold: Names = NONE_FOLDED) -> None:
        self._problem = problem
        trace, axes, structure = _traced(problem)
        self.losses = trace.losses.detach()
        self.expected = expected(problem, trace.losses, ("recorded", structure, bool(fold)))
        uses = list(trace.uses)
        self.records: list[Record | None] = [None] * len(uses)
        self.trace = replace(trace, uses=tuple(use.without_arguments() for use in uses))
        del trace  # so that the backward pass can free what no record reads
        reached, folding = [False] * len(uses), self._foldable(uses, fold)

        def visit(k: int, grads: list[Tensor | None]) -> None:
            reached[k] = any(g is not None for g in grads)
            record = _record(uses[k], grads, axes[k], problem.dot_precision)
            if record is not None:
                record = _folded(record, self.trace) if k in folding else record
                uses[k] = record.use
            self.records[k] = record

        with nothing_added(problem.trainable):
            visit_output_gradients(self.trace, visit, folding)
        self.trace = replace(self.trace, uses=tuple(uses))
        _require_participation(problem, self.trace, reached)
        if self.expected is not None:
            self.expected.require_gradient(self.weighted_gradient(self.expected.numbers, keep=True))
            _require_dots(problem, self, self.expected)

    def fold(self, names: Names) -> None:
        """Keep per-example gradients of these parameters instead of A and B, where that makes several answers cheaper.
        If `names` are given to the constructor, A and B are dropped during the pass.
        """
        uses = list(self.trace.uses)
        for k in self._foldable(uses, names):
            record = self.records[k]
            if record is not None:
                self.records[k] = folded = _folded(record, self.trace)
                uses[k] = folded.use
        self.trace = replace(self.trace, uses=tuple(uses))

    def _foldable(self, uses: Sequence[Use], names: Names) -> set[int]:
        """Uses whose layer always forms per-example gradients, or may for these parameters."""
        wanted, found = self._served(names), set[int]()
        for k, use in enumerate(uses):
            rule = rule_for(use.call)
            if rule.by_example or (rule.per_example and all(id(p) in wanted for _, p in use.call.parameters)):
                found.add(k)
        return found

    def dots_along(
        self, direction: Mapping[int, Tensor], paired: Mapping[int, Record] = NONE_PAIRED, columns: int = 0
    ) -> Tensor:
        """<dl_n/dtheta, V>, [n]; V by identity of the parameter, or as the meta record paired with a use.

        If a number of columns is given, the records belong to that many meta examples, one column each, and the
        direction to the first of them: [n, columns].
        """
        self._require_intact()
        tangents = stage_dots.extend_to_derived(direction, self.trace.derivations)
        total = _Total(self.trace, columns)
        with _without_autocast(self.losses.device.type):
            for k, record in enumerate(self.records):
                if record is not None:
                    total.add(record, paired.get(k), tangents)
        return total.dots

    def weighted_gradient(self, weights: Tensor, keep: bool = False, only: Names | None = None) -> dict[str, Tensor]:
        """sum_n weights_n dl_n/dtheta by name, for every trainable parameter or for some.

        Unless `keep`, each record is freed once its gradient is computed, and the pass is over.
        """
        self._require_intact()
        kept = [record for record in self.records if record is not None]
        derivations = self.trace.derivations
        if only is not None:
            wanted = self._served(only)
            kept = [part for part in (restricted(record, wanted) for record in kept) if part is not None]
        if not keep:
            self.records, self.trace = [], self.trace.released()
        records = reversed(kept) if keep else _let_go(kept)
        asked = self._problem.trainable if only is None else only
        return self._problem.without_unused(weighted_gradients(records, derivations, weights, asked))

    def _served(self, names: Names) -> set[int]:
        """Identities of the parameters and of all derived tensors."""
        derived = (id(t) for call in self.trace.derivations for t in call.outputs if t is not None)
        return {*(id(p) for p in names.values()), *derived}

    def _require_intact(self) -> None:
        for record in self.records:
            if record is not None:
                require_unchanged(record.use)


class InPassing:
    """The graph is kept instead: each B is used and dropped; a weighted gradient takes another backward pass."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.trace, self._axes, structure = _traced(problem)
        self.losses = self.trace.losses.detach()
        self.expected = expected(problem, self.trace.losses, ("in passing", structure))
        if self.expected is not None:
            _require_dots(problem, self, self.expected)

    def dots_along(
        self, direction: Mapping[int, Tensor], paired: Mapping[int, Record] = NONE_PAIRED, columns: int = 0
    ) -> Tensor:
        trace = self.trace
        tangents = stage_dots.extend_to_derived(direction, trace.derivations)
        total, reached = _Total(trace, columns), [False] * len(trace.uses)

        def visit(k: int, grads: list[Tensor | None]) -> None:
            reached[k] = reached[k] or any(g is not None for g in grads)
            record = _record(trace.uses[k], grads, self._axes[k], self._problem.dot_precision)
            if record is not None:
                with torch.no_grad(), _without_autocast(self.losses.device.type):
                    total.add(record, paired.get(k), tangents)

        with unchanged_buffers(self._problem.model):  # checkpointed layers run again, and once more for the gradient
            visit_output_gradients(trace, visit, range(len(trace.uses)), retain_graph=True)
        _require_participation(self._problem, trace, reached)
        return total.dots

    def weighted_gradient(self, weights: Tensor, keep: bool = False, only: Names | None = None) -> dict[str, Tensor]:
        losses = self.trace.losses
        if not keep:  # the backward pass frees what nobody holds, layer by layer
            self.trace = self.trace.released()
        return weighted_backward(self._problem, losses, weights, keep, only)


def recorded(problem: Problem, fold: Names = NONE_FOLDED) -> Recorded | InPassing:
    """The train pass according to `problem.memory`; if it keeps records, those of `fold` as in `Recorded.fold`.

    Raises:
        EngineUnavailable: examples interact, or a parameter is used where tracing cannot see it.
    """
    return InPassing(problem) if problem.memory == "two_pass" else Recorded(problem, fold)


def _require_dots(problem: Problem, train: Recorded | InPassing, expected: Expected) -> None:
    direction = problem.by_identity(expected.direction)
    expected.forget()
    expected.require_dots(train.dots_along(direction))


def _traced(problem: Problem) -> tuple[Trace, Axes, Hashable]:
    """The pass, the example axes of its uses, and a hash of its operations."""
    problem.writes.settle()
    trace = trace_batch(
        problem.model, problem.batch, problem.loss_fn, problem.trainable, problem.argument, problem.writes
    )
    if trace.couplings and trace.examples > 1:
        raise EngineUnavailable(
            f"examples interact: {trace.couplings[0]}; put the model's normalisation in eval mode, or use "
            "engine='jvp', or approximate with batchnorm='frozen'"
        )
    fingerprint, leaves = require_complete(trace, {id(p): name for name, p in problem.trainable.items()})
    problem.require_own(leaves)

    def poisoned(axes: Sequence[Sequence[ExampleAxis | None]], inside: Tensor) -> Tensor:
        return poisoned_losses(problem.model, problem.batch, problem.loss_fn, problem.trainable, axes, inside)

    axes = example_axes(problem.model, trace, fingerprint, problem.context, poisoned)
    return trace, axes, fingerprint.operations


def _record(
    use: Use, grads: list[Tensor | None], axes: Sequence[ExampleAxis | None], dot_precision: str
) -> Record | None:
    """The use with its B; None if the losses do not depend on it, or it has no entries."""
    if all([g is None or g.numel() == 0 for g in grads]):
        return None
    require_unchanged(use)
    record, opened = Record(use, tuple(grads), tuple(axes), dot_precision), rule_for(use.call).opened
    return record if opened is None else opened(record)


def _folded(record: Record, trace: Trace) -> Record:
    """The record with per-example gradients instead of A and B, if its layer forms them."""
    with torch.no_grad(), _without_autocast(trace.losses.device.type):
        return stage_dots.folded(record, trace.examples)


def _let_go(records: list[Record]) -> Iterator[Record]:
    """One record at a time, so that the memory of each can be reused for the gradient of the next."""
    while records:
        yield records.pop()


def restricted(record: Record, wanted: Set[int]) -> Record | None:
    """The record as if only the wanted tensors were trainable; None if it has none of them."""
    parameters = tuple(entry for entry in record.call.parameters if id(entry[1]) in wanted)
    if len(parameters) == len(record.call.parameters):
        return record
    use = record.use._replace(call=record.call._replace(parameters=parameters))
    gradients = {key: found for key, found in record.gradients.items() if key in wanted}
    return replace(record, use=use, gradients=gradients) if parameters else None


def require_unchanged(use: Use) -> None:
    """Raise EngineUnavailable if an input of the use is not what it was when the call read it."""
    for tensor, version in use.call.versions:
        if tensor._version != version:
            raise EngineUnavailable(
                f"the input of {use.name} (shape {tuple(tensor.shape)}) was overwritten in place after it was read, so "
                "its dots would be wrong; make that operation out of place, or use engine='jvp'"
            )


class _Total:
    """The running sum of the dots over the uses of a pass."""

    def __init__(self, trace: Trace, columns: int) -> None:
        shape = (trace.examples, columns) if columns else (trace.examples,)
        self.dots = torch.zeros(shape, dtype=_sum_dtype(trace.losses), device=trace.losses.device)
        self._columns, self._directed = columns, self.dots[:, 0] if columns else self.dots

    def add(self, record: Record, meta_record: Record | None, tangents: Tangents) -> None:
        record, n = _with_range(record), self.dots.shape[0]
        if meta_record is not None:
            self.dots += stage_dots.pair_dots(record, meta_record, n, self._columns)
        term = stage_dots.direction_dots(record, tangents, n)
        if term is not None:
            self._directed += term


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Products with V are not part of the model: autocast would round V, and overflow in float16."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _with_range(record: Record) -> Record:
    """B in float32 if it is float16: if the losses are scaled to its range, so are B and V, and products overflow."""
    if all([g is None or g.dtype != torch.float16 for g in record.output_grads]):
        return record
    return replace(record, output_grads=tuple(None if g is None else g.float() for g in record.output_grads))


def _sum_dtype(losses: Tensor) -> torch.dtype:
    return torch.float64 if losses.dtype == torch.float64 else torch.float32


def _require_participation(problem: Problem, trace: Trace, reached: list[bool]) -> None:
    """Every trainable parameter must have a use that the losses depend on, its own or through a derived tensor."""
    known = {id(p) for use, yes in zip(trace.uses, reached, strict=True) if yes for _, p in use.call.parameters}
    for call in reversed(trace.derivations):
        if any(t is not None and id(t) in known for t in call.outputs):
            known.update(id(p) for _, p in call.parameters)
    problem.require_participation(known)
