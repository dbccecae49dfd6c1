"""One case, all ways: check, count, time; rows come out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Case, problem_of
from benchmarks.gate import Gate, Shares
from benchmarks.measure import count
from benchmarks.peers import PEERS
from benchmarks.providers import (
    CAPTURED_PROVIDERS,
    COMPILED_PEERS,
    COMPILED_PROVIDERS,
    FUSED_PROVIDERS,
    PROVIDERS,
    ROUNDED_PROVIDERS,
    Outcome,
    Step,
)
from benchmarks.rows import Row
from benchmarks.timing import interleaved


@dataclass(frozen=True)
class Subject:
    """What is measured, as its rows name it."""

    case: str
    shapes: str
    dtype: torch.dtype

    def row(self, provider: str, status: str, **figures: Any) -> Row:
        return Row(self.case, self.shapes, str(self.dtype).removeprefix("torch."), provider, status, **figures)


def compare(
    case: Case,
    *,
    device: str = "cpu",
    seconds: float = 10.0,
    only: list[str] | None = None,
    also: Sequence[str] = (),
) -> list[Row]:
    """Rows of a whole re-weighted step in plain steps: by everybody and those that are asked for, or by some only."""
    problem = problem_of(case, device)
    usual = PROVIDERS | PEERS | (FUSED_PROVIDERS if case.fused else {})
    asked = ("plain", *only) if only else (*usual, *also)
    others = COMPILED_PROVIDERS | COMPILED_PEERS | CAPTURED_PROVIDERS | ROUNDED_PROVIDERS
    chosen = {name: make for name, make in (usual | others).items() if name in asked}
    ways = {name: lambda make=make: make(problem) for name, make in chosen.items()}
    subject = Subject(case.name, case.shapes, case.dtype)
    try:
        return measured(subject, ways, Gate(problem).judge, unit="plain", device=device, seconds=seconds)
    finally:
        problem.model.zero_grad(set_to_none=True)


def measured(
    subject: Subject,
    ways: dict[str, Callable[[], Step]],
    judge: Callable[[Outcome], Shares],
    *,
    unit: str,
    device: str = "cpu",
    seconds: float = 10.0,
) -> list[Row]:
    """Rows of all ways to do one thing, relative to `unit`, which is the first of them.

    A way that stops, is not installed or fails its check gets a row that says so, and no time.
    """
    steps: dict[str, Step] = {}
    shares: dict[str, Shares] = {}
    outcomes: dict[str, Outcome] = {}
    counts: dict[str, tuple[int, int]] = {}
    rows: dict[str, Row] = {}
    for name, prepare in ways.items():
        try:
            step = prepare()
            step()  # what is learnt once per model is no part of a step
            outcomes[name], *counted = count(step, device)
            counts[name] = (counted[0], counted[1])
            shares[name] = judge(outcomes[name])
        except Exception as error:  # a kernel's compiler raises errors without a base class of their own
            rows[name] = subject.row(name, _reason(error))
            continue
        if shares[name].green:
            steps[name] = step
        else:
            used = f"dots {shares[name].dots:.3g}, gradient {shares[name].gradient:.3g}"
            rows[name] = subject.row(name, f"over the error budget, in budgets: {used}")
    for name, timing in interleaved(steps, unit=unit, seconds=seconds, device=device).items():
        weights = None if outcomes[name].dots is None else outcomes[name].weights
        operations, peak = counts[name]
        # What inductor fuses, the counters do not see, but a GPU's allocator does; a graph's memory is there before.
        counted = not name.endswith(("compiled", "captured"))
        seen = counted or (device == "cuda" and name.endswith("compiled"))
        rows[name] = subject.row(
            name,
            "measured",
            engine=outcomes[name].engine,
            kept=None if weights is None else float((weights > 0).double().mean()),
            rounds=timing.rounds,
            milliseconds=timing.milliseconds,
            ratio=timing.ratio,
            ratio_p20=timing.ratio_p20,
            ratio_p80=timing.ratio_p80,
            processor_ratio=timing.processor_ratio,
            gigaflops=operations / 1e9 if counted else None,
            flop_ratio=operations / counts[unit][0] if counted and counts[unit][0] else None,
            peak_megabytes=peak / 2**20 if seen else None,
            peak_ratio=peak / counts[unit][1] if seen and counts[unit][1] else None,
            dots_budget_used=shares[name].dots,
            gradient_budget_used=shares[name].gradient,
        )
    return [rows[name] for name in ways]


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return reason if reason.startswith("not run") else f"stops: {reason}"


def table(rows: list[Row], prototypes: dict[str, float | None] | None = None) -> str:
    """Ratios to the unit, with spread, operations and memory; one block per case."""
    heads = ("units", "spread", "cpu", "ms", "flops", "peak", "kept")
    widths = (9, 18, 8, 9, 8, 8, 7)
    lines = [f"{'case':<34}{'way':<36}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))]
    previous = ""
    for row in rows:
        label = row.case if row.case != previous else ""
        previous = row.case
        start = f"{label:<34}{row.provider:<36}"
        if not row.measured:
            lines.append(f"{start}  {row.remark}")
            continue
        cells = (
            f"{row.ratio:.2f}",
            f"{row.ratio_p20:.2f} - {row.ratio_p80:.2f}",
            f"{row.processor_ratio:.2f}",
            f"{row.milliseconds:.1f}",
            *("" if value is None else f"{value:.2f}" for value in (row.flop_ratio, row.peak_ratio, row.kept)),
        )
        lines.append(start + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
        prototype = (prototypes or {}).get(row.case)
        if row.provider == "metakern" and prototype:
            lines[-1] += f"   to beat {prototype:.2f}"
    return "\n".join(lines)
