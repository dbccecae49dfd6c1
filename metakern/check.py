"""Is metakern exact for this model and this batch? Compares what would run with float64 gradients of single losses."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metakern.capture import EngineUnavailable, trace_batch
from metakern.capture.losses import LossFunction, per_example_losses
from metakern.capture.parameters import require_servable, select_parameters, trainable_parameters
from metakern.capture.state.passes import PassState
from metakern.capture.state.uncompiled import uncompiled
from metakern.engines import Problem, pose
from metakern.engines.recorded import recorded
from metakern.step import reweight_step
from metakern.testing.budget import Verdict, unit, verdict
from metakern.testing.oracle import copy_of


@dataclass(frozen=True)
class ParameterCheck:
    """One parameter: how it is used, its share of the dots, and the error of its weighted gradient."""

    name: str
    shape: tuple[int, ...]
    uses: str  # torch functions that it is an argument of; "" if only forward mode saw it
    share: float  # of sum_n |dots_n|, where each parameter's part counts with its absolute value
    gradient: Verdict


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; `ok` is the verdict, `str(report)` a table."""

    engine: str
    why_not_ghost: str  # "" if ghost runs
    dots: Verdict
    parameters: tuple[ParameterCheck, ...]
    advice: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.dots.ok and all(row.gradient.ok for row in self.parameters)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.parameters)
        lines = [f"{'parameter':<{width}}  {'shape':<18} {'share':>6}  {'error/budget':>12}  used by"]
        for row in self.parameters:
            lines.append(
                f"{row.name:<{width}}  {'x'.join(map(str, row.shape)):<18} {row.share:6.1%}  "
                f"{row.gradient.share:12.3f}  {row.uses}" + ("" if row.gradient.ok else "  WRONG")
            )
        lines.append(f"dots: error {self.dots.error:.1e}, {self.dots.share:.3f} of the budget")
        lines.append(f"engine: {self.engine}" + (f" ({self.why_not_ghost})" if self.why_not_ghost else ""))
        lines.extend(f"advice: {line}" for line in self.advice)
        lines.append("exact" if self.ok else "NOT EXACT: please report this model")
        return "\n".join(lines)


@uncompiled()
def check(
    model: nn.Module,
    batch: Any,
    meta_batch: Any,
    *,
    loss_fn: LossFunction | None = None,
    engine: str = "auto",
    params: Any = None,
    memory: str = "reuse",
    micro_batch: int | None = None,
    examples: int = 8,
    allow_unused: bool = False,
) -> CheckReport:
    """Compare the engine that `l2rw_step` would use with the definition, on a float64 copy of the model.

    dots_n = <dl_n/dtheta, dL_meta/dtheta> and sum_n w_n dl_n/dtheta, from one backward pass per loss l_n of the whole
    batch, so that they are also right where examples interact. The copy has no dropout; the model itself is unchanged.

    Args:
        examples: how many of the batch's examples to compare.
        model, batch, meta_batch, loss_fn, engine, params, memory, micro_batch, allow_unused: as for `l2rw_step`.

    Returns:
        `CheckReport`; print it for a table with a row per parameter; `report.ok` is the verdict.

    Raises:
        As `l2rw_step`; ValueError for examples < 1; RuntimeError if the copy cannot run in float64.

    Source: the dots are those of Ren et al., Learning to Reweight Examples for Robust Deep Learning, ICML 2018,
        algorithm 1; the comparison is metakern's own (docs/numerics.md).
    """
    if not isinstance(examples, int) or examples < 1:
        raise ValueError(f"examples must be at least 1 and whole, got {examples!r}")
    require_servable(model)
    chosen = list(select_parameters(model, trainable_parameters(model), params))
    # Whatever runs on the copy draws random numbers and calls the same loss function.
    with PassState(model, loss_fn).replayed():
        replica, without_dropout = _float64_copy(model)
        batch, meta_batch = (tree_map(_double, each) for each in (batch, meta_batch))
        try:
            truth = _Truth(replica, batch, meta_batch, loss_fn, examples, chosen)
        except RuntimeError as error:
            if isinstance(error, EngineUnavailable):
                raise
            raise RuntimeError(
                "check runs a copy of the model in float64, and its forward or backward pass fails there; tensors that "
                "are neither parameters, buffers or attributes of a module nor part of the batch keep their precision: "
                f"{error}"
            ) from error
        found = reweight_step(
            replica,
            batch,
            meta_batch,
            rule=truth.weights_like,
            loss_fn=loss_fn,
            engine=engine,
            params=chosen,
            memory=memory,
            micro_batch=micro_batch,
            allow_unused=allow_unused,
        )
        named = trainable_parameters(replica)
        uses = _uses(replica, batch, loss_fn, named)
        problem = pose(replica, batch, meta_batch, loss_fn, chosen, memory, allow_unused=allow_unused)
        why_not = _refusal(problem) if found.engine == "jvp" else ""
        advice = ["dropout was switched off for the comparison"] if without_dropout else []
        dots, rows = _judged(truth, found.dots, named, uses, torch.float64)
        if not (dots.ok and all(row.gradient.ok for row in rows)):
            rounded, rounded_rows = _judged(truth, found.dots, named, uses, torch.float32)
            if rounded.ok and all(row.gradient.ok for row in rounded_rows):
                dots, rows = rounded, rounded_rows
                advice.append("exact only to float32, because the model computes in float32 inside, or nearly so")
        if why_not:
            advice.append(
                "but for the reason given above, the cheaper engine, ghost, would run; metakern.explain shows costs"
            )
        return CheckReport(found.engine, why_not, dots, rows, tuple(advice))


def _judged(
    truth: _Truth, dots: Tensor, named: dict[str, nn.Parameter], uses: dict[int, list[str]], dtype: torch.dtype
) -> tuple[Verdict, tuple[ParameterCheck, ...]]:
    rows = tuple(truth.judge(name, p, uses[id(p)], dtype) for name, p in named.items())
    return truth.judge_dots(dots, dtype), rows


class _Truth:
    """Gradients of the first losses, one backward pass each, and what follows from them.

    Not `testing.oracle`, which takes a pass for every example and meta example, and keeps neither the parts of the dots
    nor gradients of parameters outside `params`.
    """

    def __init__(
        self, model: nn.Module, batch: Any, meta_batch: Any, loss_fn: Any, examples: int, chosen: list[str]
    ) -> None:
        named = trainable_parameters(model)
        frozen = copy_of(model)  # so that running statistics move in neither
        parameters = [p for p in frozen.parameters() if p.requires_grad]
        losses = per_example_losses(frozen, batch, loss_fn, "batch")
        meta_loss = per_example_losses(frozen, meta_batch, loss_fn, "meta_batch").mean()
        self.count = min(examples, losses.shape[0])
        along = zip(named, _gradient(meta_loss, parameters))
        self.direction = {name: v if name in chosen else torch.zeros_like(v) for name, v in along}
        self.gradients = [dict(zip(named, _gradient(losses[n], parameters))) for n in range(self.count)]
        self.parts = {
            name: torch.stack([(g[name] * self.direction[name]).sum() for g in self.gradients]) for name in named
        }
        self.weights = torch.linspace(0.5, 1.5, self.count, dtype=torch.float64, device="cpu")

    def weights_like(self, dots: Tensor) -> Tensor:
        """Weights on the compared examples only, so that the gradient can be compared without the others."""
        weights = torch.zeros_like(dots)
        weights[: self.count] = self.weights.to(dots)
        return weights

    def judge_dots(self, dots: Tensor, dtype: torch.dtype) -> Verdict:
        want = reduce(torch.add, self.parts.values())
        sizes = torch.stack([_norm(g) for g in self.gradients]) * _norm(self.direction)
        return verdict("dots", dots[: self.count], want, unit(dtype, 1000) * sizes)

    def judge(self, name: str, parameter: nn.Parameter, uses: list[str], dtype: torch.dtype) -> ParameterCheck:
        want = reduce(torch.add, (g[name] * w for w, g in zip(self.weights.tolist(), self.gradients)))
        size = sum(w * _norm(g) for w, g in zip(self.weights.tolist(), self.gradients))
        total = sum(part.abs().sum() for part in self.parts.values())
        share = float(self.parts[name].abs().sum() / total) if float(total) else 0.0
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return ParameterCheck(
            name,
            tuple(parameter.shape),
            ", ".join(dict.fromkeys(uses)),
            share,
            verdict(name, got, want, unit(dtype, 1000) * size),
        )


def _float64_copy(model: nn.Module) -> tuple[nn.Module, bool]:
    """A copy in float64 without dropout, and whether there was any."""
    replica, changed = copy_of(model).double(), False
    for module in replica.modules():
        vars(module).update({name: _double(value) for name, value in vars(module).items() if isinstance(value, Tensor)})
        for attribute in ("p", "dropout", "dropout_p", "attention_dropout"):
            rate = getattr(module, attribute, None)
            is_dropout = attribute != "p" or isinstance(module, nn.modules.dropout._DropoutNd)
            if is_dropout and isinstance(rate, float) and rate > 0:
                setattr(module, attribute, 0.0)
                changed = changed or module.training
        module.zero_grad()
    return replica, changed


def _uses(model: nn.Module, batch: Any, loss_fn: Any, named: dict[str, nn.Parameter]) -> dict[int, list[str]]:
    """Identity of a parameter -> torch functions that it is an argument of, as far as a trace sees them."""
    uses: dict[int, list[str]] = defaultdict(list)
    try:
        trace = trace_batch(model, batch, loss_fn, named, "batch")
    except EngineUnavailable:
        return uses
    for call in (*trace.derivations, *(use.call for use in trace.uses)):
        for _, parameter in call.parameters:
            uses[id(parameter)].append(call.name)
    return uses


def _refusal(problem: Problem) -> str:
    """Why ghost cannot run, "" if it can."""
    try:
        recorded(problem)
    except EngineUnavailable as refusal:
        return str(refusal)
    return ""


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found)]


def _norm(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors.values()]).norm()


def _double(leaf: Any) -> Any:
    return leaf.detach().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
