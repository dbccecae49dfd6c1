"""Every example of the batch with every meta example: dots_nj = <g_n, g'_j>, [n, m].

One direction V_j = g'_j at a time along one pass over the batch: there is never more than one. Where ghost serves both
batches V_j comes from records of the meta batch, as its weighted gradient of one-hot weights; weights of linear layers
take the pairs form where that is cheaper, and no V_j is formed for them. Else V_j is a backward pass of l'_j.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakern import dots as stage_dots
from metakern.capture.record import Record
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state import unchanged_buffers
from metakern.engines.problem import Answer, Problem, named_gradients
from metakern.engines.recorded import Recorded
from metakern.engines.train_pass import GhostPass, TrainPass, open_pass
from metakern.engines.weighted_backward import weighted_backward


def solve(problem: Problem, engine: str) -> tuple[Answer, str]:
    """The dots [n, m], by the engine asked for or by the cheapest exact one, and its name.

    Raises: as `metakern.engines.solve`.
    """
    train, used = open_pass(problem, engine)
    with unchanged_buffers(problem.model):
        columns, losses = _columns(problem, train)
        dots = torch.stack(list(columns), 1)
    return Answer(dots, train.losses, losses.mean(), train.weighted_gradient), used


def _columns(problem: Problem, train: TrainPass) -> tuple[Iterator[Tensor], Tensor]:
    """Dots with each meta example in turn, and the losses of the meta batch, [m]."""
    if isinstance(train, GhostPass):
        try:
            meta = Recorded(_as_batch(problem))
        except EngineUnavailable:  # meta examples interact among themselves, say
            pass
        else:
            return _by_records(problem, train, meta), meta.losses
    losses = problem.meta_losses()
    return _by_backward(problem, train, losses), losses.detach()


def _by_backward(problem: Problem, train: TrainPass, losses: Tensor) -> Iterator[Tensor]:
    for one in torch.eye(len(losses), dtype=losses.dtype, device=losses.device):
        v = weighted_backward(problem, losses, one, keep=True, only=problem.chosen)
        yield train.dots(named_gradients(v, v.values()))


def _by_records(problem: Problem, train: GhostPass, meta: Recorded) -> Iterator[Tensor]:
    m = len(meta.losses)
    pairs = _pairs(problem, train, meta)
    directed = {name: p for name, p in problem.chosen.items() if id(p) not in pairs}
    for j, one in enumerate(torch.eye(m, dtype=meta.losses.dtype, device=meta.losses.device)):
        v = meta.weighted_gradient(one, keep=True, only=directed)
        paired = {pair.use: stage_dots.of_example(pair.meta_record, m, j) for pair in pairs.values()}
        yield train.records.dots_along({id(directed[name]): g for name, g in v.items()}, paired)


class _Pair(NamedTuple):
    use: int  # of the train pass
    meta_record: Record


def _pairs(problem: Problem, train: GhostPass, meta: Recorded) -> dict[int, _Pair]:
    """Identity of a weight -> its only uses in either pass, where pairs are cheaper than m directions."""
    chosen = {id(p): p for p in problem.chosen.values()}
    uses, candidates = train.records.trace.uses, stage_dots.pairable(train.records.trace, chosen)
    found = {}
    for key, j in stage_dots.pairable(meta.trace, chosen).items():
        record = meta.records[j]
        if key in candidates and record is not None and record.axes[0].leading:
            use = candidates[key]
            if stage_dots.pairs_are_cheaper(uses[use], record.use, directions=len(meta.losses)):
                found[key] = _Pair(use, record)
    return found


@dataclass(frozen=True)
class _MetaBatch(Problem):
    """The meta batch as the batch of a pass; that a parameter takes no part in it is no error."""

    @property
    def argument(self) -> str:
        return "meta_batch"

    def require_participation(self, reached: set[int]) -> None:
        pass


def _as_batch(problem: Problem) -> _MetaBatch:
    values: dict[str, Any] = {entry.name: getattr(problem, entry.name) for entry in fields(Problem)}
    return _MetaBatch(**values | {"batch": problem.meta_batch})
