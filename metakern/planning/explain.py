"""What would run for a model and its batches: for each use of a parameter, the rule, the form of its dots and its cost.

`metakern.plan` is another name of `explain`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metakern import dots as stage_dots
from metakern.capture import EngineUnavailable, Record, Trace, trace_batch
from metakern.capture.losses import LossFunction
from metakern.capture.record import Call
from metakern.capture.state.buffers import unchanged_buffers
from metakern.capture.state.passes import PassState, unchanged_on_error
from metakern.capture.trace import tensor_arguments
from metakern.engines import ghost
from metakern.engines.cut import cut
from metakern.engines.micro_batch import several_parts
from metakern.engines.part import examples_in, part_of
from metakern.engines.problem import Problem, pose
from metakern.engines.recorded import Recorded
from metakern.layers.per_example import Folded
from metakern.layers.recurrent import Opened
from metakern.layers.rule import Weights
from metakern.layers.table import rule_for
from metakern.planning import pass_counts, peak_memory
from metakern.planning.explanation import Explanation, UseCost
from metakern.planning.live_storage import Sizes, sizes
from metakern.planning.pass_counts import NONE, Passes, counter
from metakern.planning.peak_memory import Memory


def explain(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    loss_fn: LossFunction | None = None,
    params: Any = None,
    micro_batch: int | None = None,
    allow_unused: bool = False,
) -> Explanation:
    """Which rule and form `l2rw_step` uses for each use of a parameter, why, and what it costs.

    direction: dots_n = sum_t B_nt^T V A_nt;  pairs: dots_n = (1/m) sum_j sum_ts (A_nt.A'_js)(B_nt.B'_js)

    Runs some ten passes over batch [n] and meta_batch [m], or over two parts of each; the model, its gradients and
    attributes, and the random state are left unchanged. The last lines predict the operations of a step, in plain
    steps, and its peak memory beyond what is allocated before; with `micro_batch`, assuming that each part has an
    example of non-zero weight.

    Args:
        model, batch, meta_batch, loss_fn, params, micro_batch, allow_unused: as for `l2rw_step`.
    Returns: `Explanation`; print it for a table.
    Raises: TypeError, ValueError as `l2rw_step`. If ghost rejects the model, the explanation says why; with
        `micro_batch`, which only ghost supports, NotImplementedError.
    Source: docs/architecture.md has the choice between the two forms, docs/performance.md how costs are counted.
    """
    problem = pose(model, batch, meta_batch, loss_fn, params, "reuse", allow_unused=allow_unused)
    size = micro_batch if micro_batch is not None and several_parts(problem, "auto", micro_batch) else None
    start = PassState(model, loss_fn)
    try:
        with start.replayed(), unchanged_on_error(model):
            return _by_ghost(problem) if size is None else _by_parts(problem, size)
    except EngineUnavailable as error:
        if size is not None:
            raise
        refusal = str(error)  # the error itself would keep alive, by its traceback, what ghost's passes have kept
    with start.replayed():
        return Explanation("jvp", refusal, (), *_by_forward_mode(problem))


plan = explain


def _by_ghost(problem: Problem) -> Explanation:
    costs, passes = _operations(problem, whole=True)
    return Explanation("ghost", "", costs, passes, peak_memory.by_ghost(problem))


def _by_parts(problem: Problem, size: int) -> Explanation:
    """Operations of the first part of both batches, scaled to all parts. At least two examples are taken, since one
    tells nothing about independence.
    """
    batches = problem.batch, problem.meta_batch
    batch, meta_batch = (cut(b, max(size, 2), name)[0] for b, name in zip(batches, ("batch", "meta_batch")))
    times, meta_times = (examples_in(b) / examples_in(first) for b, first in zip(batches, (batch, meta_batch)))
    costs, passes = _operations(part_of(problem, batch, set(), meta_batch=meta_batch), whole=False)
    costs = tuple(_times(cost, times) for cost in costs)
    return Explanation("ghost", "", costs, passes.times(times, meta_times), peak_memory.by_parts(problem, size), size)


def _operations(problem: Problem, whole: bool) -> tuple[tuple[UseCost, ...], Passes]:
    train = Recorded(problem)
    meta = trace_batch(problem.model, problem.meta_batch, problem.loss_fn, problem.trainable, "meta_batch")
    forms = _Forms(problem, train.trace, meta, whole)
    _, v = problem.meta_gradient()
    costs = tuple(_costs(problem, train, forms, v))
    opened = any(isinstance(record.call.func, Opened) for record in train.records if record is not None)
    return costs, pass_counts.by_ghost(problem, pairs=whole, opened=opened)


def _times(cost: UseCost, parts: float) -> UseCost:
    dots, gradient = (round(parts * flops) for flops in (cost.dots_flops, cost.gradient_flops))
    return replace(cost, dots_flops=dots, gradient_flops=gradient)


def _by_forward_mode(problem: Problem) -> tuple[Passes, Memory | None]:
    try:
        with unchanged_on_error(problem.model), unchanged_buffers(problem.model):
            passes = pass_counts.by_forward_mode(problem)
    except EngineUnavailable:
        return NONE, None
    return passes, peak_memory.by_forward_mode(problem)


@torch.no_grad()
def _costs(problem: Problem, train: Recorded, forms: _Forms, v: dict[str, Tensor]) -> Iterator[UseCost]:
    names = _names(problem, train.trace)
    held = sizes([*problem.model.parameters(), *problem.model.buffers(), *tree_leaves(problem.batch)], ())
    tangents = stage_dots.extend_to_derived({id(problem.chosen[k]): d for k, d in v.items()}, train.trace.derivations)
    n = train.trace.examples
    weights = Weights(torch.full((n,), 1 / n, dtype=train.losses.dtype, device=train.losses.device), None)
    for k, record in enumerate(train.records):
        if record is None:
            continue
        form, why, dots_flops = forms.of(k)
        if form == "direction":
            with counter() as counted:
                stage_dots.direction_dots(record, tangents, n)
            dots_flops = counted.get_total_flops()
        with counter() as counted:
            rule_for(record.call).weighted_grads(record, weights)
        yield UseCost(
            _listed(dict.fromkeys(names[id(p)] for _, p in record.call.parameters)),
            record.call.name,
            _rule_name(record.call),
            form,
            why,
            tuple(record.use.output_shapes[0]),
            dots_flops,
            counted.get_total_flops(),
            _newly_kept(record, held),
        )


class _Forms:
    """Pairs or direction for each use, decided as in the ghost engine."""

    def __init__(self, problem: Problem, trace: Trace, meta: Trace, whole: bool) -> None:
        self._whole = whole
        chosen = problem.chosen_by_identity
        self._trace, self._meta = trace, meta
        self._train_use = {k: key for key, k in stage_dots.pairable(trace, chosen).items()}
        self._served = {*ghost.pair_candidates(problem, trace).values()}
        self._meta_use = stage_dots.pairable(meta, chosen)
        self._counts = Counter(id(p) for use in trace.uses for _, p in use.call.parameters)

    def of(self, k: int) -> tuple[str, str, int]:
        """Form, reason, and the FLOPs of the pairs form if it is used."""
        use = self._trace.uses[k]
        weight = use.call.parameter(1, "weight")
        if weight is None or rule_for(use.call).matrices is None:
            return "direction", "no product of a matrix with a trained weight", 0
        if not self._whole:
            return "direction", "V is formed before the parts of the batch are run", 0
        if k not in self._train_use or id(weight) not in self._meta_use:
            times = self._counts[id(weight)]
            reused = f"the weight is used {times} times" if times > 1 else "the weight is derived, shared or not chosen"
            return "direction", f"{reused}; V has its cross terms", 0
        if k not in self._served:
            return "direction", "pairs would save less than it takes to trace the meta batch", 0
        meta_use = self._meta.uses[self._meta_use[id(weight)]]
        rows, meta_rows = use.output_shapes[0][:-1].numel(), meta_use.output_shapes[0][:-1].numel()
        size = "x".join(map(str, weight.shape))
        if stage_dots.pairs_are_cheaper(use, meta_use):
            flops = 2 * rows * meta_rows * (sum(weight.shape) + 1)
            return "pairs", f"{meta_rows} meta positions are few beside a {size} weight", flops
        return "direction", f"{meta_rows} meta positions are many beside a {size} weight", 0


def _names(problem: Problem, trace: Trace) -> dict[int, str]:
    names = {id(p): name for name, p in problem.trainable.items()}
    for call in trace.derivations:
        made_from = ", ".join(dict.fromkeys(names[id(p)] for _, p in call.parameters))
        for tensor in call.outputs:
            if tensor is not None:
                names[id(tensor)] = f"{_short(call)}({made_from})"
    return names


def _rule_name(call: Call) -> str:
    rule = call.func.rule if isinstance(call.func, Folded) else rule_for(call)
    return rule.applies.__module__.rpartition(".")[2]


def _listed(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if len(others) > 2 else ", ".join([first, *others])


def _short(call: Call) -> str:
    return "view" if call.name == "__get__" else call.name.strip("_")


def _inputs_of(call: Call) -> list[Tensor]:
    """A: the tensors that a use reads beside its parameters; a sum keeps none."""
    parameters = {id(p) for _, p in call.parameters}
    given = tensor_arguments(call.args, call.kwargs) if call.versions else ()
    return [tensor for _, tensor in given if id(tensor) not in parameters]


def _newly_kept(record: Record, held: Sizes) -> int:
    """Bytes of A and B that are not yet in `held`, to which they are added."""
    found = sizes([*_inputs_of(record.call), *record.output_grads, *record.gradients.values()], held)
    held.update(found)
    return sum(found.values())
