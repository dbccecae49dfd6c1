"""Every example of the batch with every meta example: dots_nj = <g_n, g'_j>, [n, m].

The batch takes one pass. Directions V_j = g'_j are formed one at a time, and never more than one is kept. If ghost
handles both batches, V_j is the weighted gradient of the meta batch's records for one-hot weights. Linear layers take
the pairs form for all columns at once if that is cheaper, without any V_j. Otherwise V_j is a backward pass of l'_j.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from metakern import dots as stage_dots
from metakern.capture.record import Record
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.graph_state import GraphState
from metakern.capture.state.passes import RestorePoint
from metakern.engines.choose import open_pass
from metakern.engines.ghost import GhostPass
from metakern.engines.problem import Answer, Problem, named_gradients
from metakern.engines.recorded import NONE_PAIRED, Recorded, restricted
from metakern.engines.train_pass import TrainPass
from metakern.engines.weighted_backward import weighted_backward


def solve(problem: Problem, engine: str, start: RestorePoint) -> tuple[Answer, str]:
    """The dots [n, m], by the engine asked for or by the cheapest exact one, and its name.

    Raises: as `metakern.engines.solve`.
    """
    train, used = open_pass(problem, engine, start)
    after_train = problem.writes.graph_state()
    with problem.writes.meta_pass():
        columns, losses = _columns(problem, train, after_train)
        dots = torch.stack(list(columns), 1)
    return Answer(dots, train.losses, losses.mean(), train.weighted_gradient), used


def _columns(problem: Problem, train: TrainPass, after_train: GraphState) -> tuple[Iterator[Tensor], Tensor]:
    """Dots with each meta example in turn, and the losses of the meta batch, [m].

    The backward passes of both batches alternate, each with the state that its own forward pass has left.
    """
    if isinstance(train, GhostPass):
        try:
            meta = Recorded(replace(problem, batch=problem.meta_batch, argument="meta_batch", reached=set()))
        except EngineUnavailable:  # for example, meta examples interact
            pass
        else:
            return _by_records(problem, train, meta, after_train), meta.losses
    losses = problem.meta_losses()
    return _by_backward(problem, train, losses, after_train), losses.detach()


def _by_backward(problem: Problem, train: TrainPass, losses: Tensor, after_train: GraphState) -> Iterator[Tensor]:
    for one in torch.eye(len(losses), dtype=losses.dtype, device=losses.device):
        v = weighted_backward(problem, losses, one, keep=True, only=problem.chosen)
        with after_train.reinstated():
            dots = train.dots(named_gradients(v, v.values()))
        yield dots


def _by_records(problem: Problem, train: GhostPass, meta: Recorded, after_train: GraphState) -> Iterator[Tensor]:
    m = len(meta.losses)
    paired = _pairs(problem, train, meta)
    covered = {id(p) for record in paired.values() for _, p in record.call.parameters}
    directed = {name: p for name, p in problem.chosen.items() if id(p) not in covered}
    meta.fold(directed)

    def along(one: Tensor, paired: Mapping[int, Record] = NONE_PAIRED, columns: int = 0) -> Tensor:
        found = meta.weighted_gradient(one, keep=True, only=directed) if directed else {}
        v = named_gradients(found, found.values())
        with after_train.reinstated():
            return train.records.dots_along({id(directed[name]): g for name, g in v.items()}, paired, columns)

    first, *others = torch.eye(m, dtype=meta.losses.dtype, device=meta.losses.device)
    columns = along(first, paired, m).unbind(1)
    yield columns[0]
    for one, column in zip(others, columns[1:], strict=True):
        yield column + along(one) if directed else column


def _pairs(problem: Problem, train: GhostPass, meta: Recorded) -> dict[int, Record]:
    """Uses in the train pass -> records of the meta pass, for weights (and biases next to them) that are used once in
    each pass and for which pairs are cheaper than m directions."""
    chosen = problem.chosen_by_identity
    trace = train.records.trace
    candidates, meta_candidates = stage_dots.pairable(trace, chosen), stage_dots.pairable(meta.trace, chosen)
    biases, meta_biases = (
        stage_dots.pairable_biases(trace, candidates), stage_dots.pairable_biases(meta.trace, meta_candidates)
    )  # fmt: skip
    found = {}
    for key, j in meta_candidates.items():
        record, use = meta.records[j], candidates.get(key)
        if use is None or record is None or not record.axes[0].leading:
            continue
        if stage_dots.pairs_are_cheaper(trace.uses[use], record.use, directions=len(meta.losses)):
            bias = biases.get(key)
            beside = {id(bias)} if bias is not None and bias is meta_biases.get(key) and id(bias) in chosen else set()
            found[use] = restricted(record, {key} | beside)
    return found
