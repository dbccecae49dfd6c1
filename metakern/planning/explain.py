"""What would run for a model and its batches: for each use of a parameter, the rule, the form of its dots and its cost.

`metakern.plan` is another name of `explain`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from metakern import dots as stage_dots
from metakern.capture import EngineUnavailable, Record, Trace, trace_batch
from metakern.capture.losses import LossFunction
from metakern.capture.record import Call
from metakern.capture.state import PassState, unchanged_buffers, unchanged_on_error
from metakern.engines import ghost
from metakern.engines.cut import cut
from metakern.engines.micro_batch import several_parts
from metakern.engines.part import examples_in, part_of
from metakern.engines.problem import Problem, pose
from metakern.engines.recorded import Recorded
from metakern.layers.per_example import Folded
from metakern.layers.rule import Weights
from metakern.layers.table import rule_for
from metakern.planning import pass_counts
from metakern.planning.explanation import Explanation, UseCost
from metakern.planning.forward_mode_memory import by_forward_mode
from metakern.planning.kept_pass import Sizes, inputs_of, kept_pass, sizes, there_before
from metakern.planning.pass_counts import NONE, Passes
from metakern.planning.peak_memory import Memory, foretold, foretold_by_parts


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

    Runs a few passes over batch [n] and meta_batch [m], or over one part of each; the model, its gradients and
    attributes, and the random state are left unchanged. The last lines predict the operations of a step, in plain
    steps, and its peak memory beyond what is allocated before; with `micro_batch`, assuming that each part has an
    example of non-zero weight.

    Args: as for `l2rw_step`.
    Returns: `Explanation`; print it for a table.
    Raises: TypeError, ValueError as `l2rw_step`. If ghost rejects the model, the explanation says why; with
        `micro_batch`, which only ghost supports, NotImplementedError.
    """
    problem = pose(model, batch, meta_batch, loss_fn, params, "reuse", allow_unused=allow_unused)
    parts = WHOLE
    if micro_batch is not None and several_parts(problem, "auto", micro_batch):
        problem, parts = _largest_part(problem, micro_batch)
    start = PassState(model, loss_fn)
    with warnings.catch_warnings():
        # A compiled module runs uncompiled here, and the counter's own hooks may be called twice.
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
        try:
            with start.replayed(), unchanged_on_error(model):
                return _by_ghost(problem, parts)
        except EngineUnavailable as error:
            if parts is not WHOLE:
                raise
            refusal = str(error)  # the error itself would keep alive, by its traceback, what ghost's passes have kept
        with start.replayed():
            return Explanation("jvp", refusal, (), *_by_forward_mode(problem))


plan = explain


class _Parts(NamedTuple):
    """Passes over a whole batch, in passes over its first part."""

    train: float
    meta: float
    size: int | None = None  # examples of a part; None for whole batches


WHOLE = _Parts(1.0, 1.0)


def _largest_part(problem: Problem, size: int) -> tuple[Problem, _Parts]:
    """The first part of both batches as a problem; at least two examples, with which parts of one are proved too."""
    batches = problem.batch, problem.meta_batch
    batch, meta_batch = (cut(b, max(size, 2), name)[0] for b, name in zip(batches, ("batch", "meta_batch")))
    times, meta_times = (examples_in(b) / examples_in(first) for b, first in zip(batches, (batch, meta_batch)))
    return part_of(problem, batch, set(), meta_batch=meta_batch), _Parts(times, meta_times, size)


def _by_ghost(problem: Problem, parts: _Parts) -> Explanation:
    train = Recorded(problem)
    meta = trace_batch(problem.model, problem.meta_batch, problem.loss_fn, problem.trainable, "meta_batch")
    forms = _Forms(problem, train.trace, meta, parts is WHOLE)
    _, v = problem.meta_gradient()
    costs = tuple(_times(cost, parts.train) for cost in _costs(problem, train, forms, v))
    forward, backward, meta_passes, _ = pass_counts.by_ghost(problem, meta, pairs=parts is WHOLE)
    passes = Passes(round(parts.train * forward), round(parts.train * backward), round(parts.meta * meta_passes))
    return Explanation("ghost", "", costs, passes, _memory(problem, forms, parts, _folded(train)), parts.size)


def _times(cost: UseCost, parts: float) -> UseCost:
    dots, gradient = (round(parts * flops) for flops in (cost.dots_flops, cost.gradient_flops))
    return replace(cost, dots_flops=dots, gradient_flops=gradient)


def _by_forward_mode(problem: Problem) -> tuple[Passes, Memory | None]:
    try:
        with unchanged_on_error(problem.model), unchanged_buffers(problem.model):
            passes = pass_counts.by_forward_mode(problem)
    except EngineUnavailable:
        return NONE, None
    start = PassState(problem.model, problem.loss_fn, problem.writes)
    try:
        with start.replayed():
            return passes, by_forward_mode(problem)
    except EngineUnavailable:
        return passes, None
    except RuntimeError as error:
        return passes, _not_seen(error)


def _not_seen(error: RuntimeError) -> None:
    """No figure for memory if the model forbids looking at what its graph keeps; other errors are raised."""
    if "saved tensor hooks" not in str(error):
        raise error


def _folded(train: Recorded) -> set[int]:
    """Uses for which per-example gradients are kept instead of A and B."""
    return {k for k, use in enumerate(train.trace.uses) if isinstance(use.call.func, Folded)}


def _memory(problem: Problem, forms: _Forms, parts: _Parts, folded: set[int]) -> Memory | None:
    """The peaks of a step; None if the model forbids looking at what its graph keeps."""
    try:
        train = kept_pass(problem, problem.batch, "batch", folded)
        meta = kept_pass(problem, problem.meta_batch, "meta_batch", folded)
    except RuntimeError as error:
        return _not_seen(error)
    paired = forms.paired
    chosen = problem.chosen_by_identity.keys()
    without_v = {id(p) for p in problem.trainable.values()} - chosen | paired.keys()
    if parts is WHOLE:
        return foretold(train, meta, without_v, forms.traced, list(paired.values()))
    return foretold_by_parts(train, meta, without_v, parts.train, parts.meta)


@torch.no_grad()
def _costs(problem: Problem, train: Recorded, forms: _Forms, v: dict[str, Tensor]) -> Iterator[UseCost]:
    names = _names(problem, train.trace)
    held = there_before(problem.model, problem.batch)
    tangents = stage_dots.extend_to_derived({id(problem.chosen[k]): d for k, d in v.items()}, train.trace.derivations)
    n = train.trace.examples
    weights = Weights(torch.full((n,), 1 / n, dtype=train.losses.dtype, device=train.losses.device), None)
    for k, record in enumerate(train.records):
        if record is None:
            continue
        form, why, dots_flops = forms.of(k)
        if form == "direction":
            with FlopCounterMode(display=False) as counted:
                stage_dots.direction_dots(record, tangents, n)
            dots_flops = counted.get_total_flops()
        with FlopCounterMode(display=False) as counted:
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

    @property
    def traced(self) -> bool:
        """Whether the meta batch is traced, so that pairs can be formed."""
        return bool(self._served)

    @property
    def paired(self) -> dict[int, int]:
        """Identity of a weight handled in pairs form -> its use in the meta pass."""
        return {key: self._meta_use[key] for k, key in self._train_use.items() if self.of(k)[0] == "pairs"}

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


def _newly_kept(record: Record, held: Sizes) -> int:
    """Bytes of A and B that are not yet in `held`, to which they are added."""
    found = sizes([*inputs_of(record.call), *record.output_grads, *record.gradients.values()], held)
    held.update(found)
    return sum(found.values())
