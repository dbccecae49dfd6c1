"""What would run for a model and its batches: per use of a parameter the rule, the form of its dots, and its cost.

`metakern.plan` is another name of `explain`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from metakern import dots as stage_dots
from metakern import pass_counts
from metakern.capture import EngineUnavailable, Record, Trace, trace_batch
from metakern.capture.losses import LossFunction
from metakern.capture.random_state import random_state, restore_random_state
from metakern.capture.record import Call
from metakern.capture.state import unchanged_buffers, unchanged_on_error
from metakern.engines.problem import Problem, pose
from metakern.engines.recorded import Recorded
from metakern.layers.rule import Weights
from metakern.layers.table import rule_for
from metakern.pass_counts import NONE, Passes
from metakern.peak_memory import Memory, Sizes, foretold, inputs_of, kept_pass, sizes, there_before


@dataclass(frozen=True)
class UseCost:
    """One use of parameters in the train pass."""

    parameters: str  # names; "transpose(head.weight)" for a tensor made from a parameter
    function: str  # the torch function called, or the registered module
    rule: str  # the layer rule that serves it; "generic" is forward mode through this call alone
    form: str  # "direction", with the meta gradient V, or "pairs", with the records of the meta batch
    why: str  # of that form
    output: tuple[int, ...]
    dots_flops: int  # of products, as torch counts them: elementwise work is not in it
    gradient_flops: int  # the same, were every example kept
    kept_bytes: int  # A and B that no use before has kept, held by memory="reuse" until the gradient is formed


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str(explanation)` is a table."""

    engine: str
    why_not_ghost: str  # "" where ghost serves; there are no uses then
    uses: tuple[UseCost, ...]
    passes: Passes = NONE  # NONE where neither ghost nor forward mode serves
    memory: Memory | None = None  # peaks; None where ghost does not serve, or the model differentiates by torch.func

    @property
    def plain_flops(self) -> int:
        """Of a plain step: forward, output gradients, gradients of the parameters."""
        gradient = sum(use.gradient_flops for use in self.uses)
        return self.passes.forward + self.passes.backward + gradient

    def step_flops(self, kept: float = 0.5) -> float:
        """Of `l2rw_step` when the share `kept` of the batch carries weight."""
        return sum(self.passes) + sum(use.dots_flops + kept * use.gradient_flops for use in self.uses)

    @property
    def kept_bytes(self) -> int:
        """Held by all records together until the gradient is formed; memory="two_pass" holds no output gradients."""
        return sum(use.kept_bytes for use in self.uses)

    def share(self, use: UseCost) -> float:
        """Of the FLOPs of all dots and weighted gradients."""
        total = sum(each.dots_flops + each.gradient_flops for each in self.uses)
        return (use.dots_flops + use.gradient_flops) / total if total else 0.0

    def __str__(self) -> str:
        if self.why_not_ghost:
            steps = f"; {self.step_flops() / self.plain_flops:.2f} plain steps" if self.plain_flops else ""
            return f"engine: {self.engine}, for the whole model at once ({self.why_not_ghost}){steps}"
        rows = [["parameters", "function", "rule", "form", "dots MFLOP", "gradient", "kept KiB", "share", "why"]]
        for use in self.uses:
            sizes = [_rounded(v) for v in (use.dots_flops / 1e6, use.gradient_flops / 1e6, use.kept_bytes / 1024)]
            named = [use.parameters, use.function, use.rule, use.form]
            rows.append([*named, *sizes, f"{self.share(use):.1%}", use.why])
        widths = [max(len(row[k]) for row in rows) for k in range(8)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]
        return "\n".join([*lines, self._totals(), f"engine: {self.engine}"])

    def _totals(self) -> str:
        half, none, every = (self.step_flops(kept) / max(self.plain_flops, 1) for kept in (0.5, 0, 1))
        shares = f"{half:.2f} plain steps with half of the batch kept ({none:.2f} with none, {every:.2f} with all)"
        if self.memory is None:
            return f"operations: {shares}\nmemory: records of {self.kept_bytes / 2**20:.3g} MiB"
        plain, *phases, two_pass = (_rounded(size / 2**20) for size in self.memory)
        named = ", ".join(f"{name} {size}" for name, size in zip(Memory._fields[1:], phases))
        peak = f"{_rounded(self.memory.reuse / 2**20)} MiB ({named}); a plain step {plain}, two_pass {two_pass}"
        return f"operations: {shares}\npeak memory: {peak}"


def _rounded(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def explain(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    loss_fn: LossFunction | None = None,
    params: Any = None,
) -> Explanation:
    """Which rule and which form each use of a parameter takes in `l2rw_step`, why, and what it costs.

    direction: dots_n = sum_t B_nt^T V A_nt;  pairs: dots_n = (1/m) sum_j sum_ts (A_nt.A'_js)(B_nt.B'_js)

    A few passes over batch [n] and meta_batch [m]; the model, its gradients and the random state are as before. The
    last lines foretell the operations of a step, in plain steps, and its peak memory beyond what is there before.

    Args: as for `l2rw_step`.
    Returns: `Explanation`; print it for a table.
    Raises: TypeError, ValueError as `l2rw_step`. Where ghost refuses, the explanation says why.
    """
    problem = pose(model, batch, meta_batch, loss_fn, params, "reuse")
    state = random_state()
    with warnings.catch_warnings():
        # A compiled module runs uncompiled here, and the counter's own hooks do not mind being called twice.
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
        try:
            with unchanged_on_error(model), unchanged_buffers(model):
                return _by_ghost(problem)
        except EngineUnavailable as refusal:
            return Explanation("jvp", str(refusal), (), _by_forward_mode(problem))
        finally:
            restore_random_state(state)


plan = explain


def _by_ghost(problem: Problem) -> Explanation:
    train = Recorded(problem)
    meta = trace_batch(problem.model, problem.meta_batch, problem.loss_fn, problem.trainable, "meta_batch")
    forms = _Forms(problem, train.trace, meta)
    _, v = problem.meta_gradient()
    costs = tuple(_costs(problem, train, forms, v))
    return Explanation("ghost", "", costs, pass_counts.by_ghost(problem, meta), _memory(problem, forms))


def _by_forward_mode(problem: Problem) -> Passes:
    try:
        with unchanged_on_error(problem.model), unchanged_buffers(problem.model):
            return pass_counts.by_forward_mode(problem)
    except EngineUnavailable:
        return NONE


def _memory(problem: Problem, forms: _Forms) -> Memory | None:
    """The peaks of a step; None where the model forbids to see what its graph keeps."""
    try:
        train = kept_pass(problem, problem.batch, "batch")
        meta = kept_pass(problem, problem.meta_batch, "meta_batch")
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        return None
    paired = forms.paired
    chosen = {id(p) for p in problem.chosen.values()}
    without_v = {id(p) for p in problem.trainable.values()} - chosen | paired.keys()
    return foretold(train, meta, without_v, list(paired.values()))


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
            rule_for(record.call).applies.__module__.rpartition(".")[2],
            form,
            why,
            tuple(record.use.output_shapes[0]),
            dots_flops,
            counted.get_total_flops(),
            _newly_kept(record, held),
        )


class _Forms:
    """Pairs or direction for each use, by the same questions as the ghost engine asks."""

    def __init__(self, problem: Problem, trace: Trace, meta: Trace) -> None:
        chosen = {id(p): p for p in problem.chosen.values()}
        self._trace, self._meta = trace, meta
        self._train_use = {k: key for key, k in stage_dots.pairable(trace, chosen).items()}
        self._meta_use = stage_dots.pairable(meta, chosen)
        self._counts = Counter(id(p) for use in trace.uses for _, p in use.call.parameters)

    @property
    def paired(self) -> dict[int, int]:
        """Identity of a weight that pairs serve -> its use in the meta pass."""
        return {key: self._meta_use[key] for k, key in self._train_use.items() if self.of(k)[0] == "pairs"}

    def of(self, k: int) -> tuple[str, str, int]:
        """Form, reason, and the FLOPs of the pairs form where that is taken."""
        use = self._trace.uses[k]
        weight = use.call.parameter(1, "weight")
        if weight is None or rule_for(use.call).matrices is None:
            return "direction", "no product of a matrix with a trained weight", 0
        if k not in self._train_use or id(weight) not in self._meta_use:
            times = self._counts[id(weight)]
            reused = f"the weight is used {times} times" if times > 1 else "the weight is derived, shared or not chosen"
            return "direction", f"{reused}; V has its cross terms", 0
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


def _listed(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if len(others) > 2 else ", ".join([first, *others])


def _short(call: Call) -> str:
    return "view" if call.name == "__get__" else call.name.strip("_")


def _newly_kept(record: Record, held: Sizes) -> int:
    """Bytes of A and B that are not among `held`, which they join."""
    found = sizes([*inputs_of(record.call), *record.output_grads], held)
    held.update(found)
    return sum(found.values())
