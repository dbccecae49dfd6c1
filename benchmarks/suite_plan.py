"""What `metakern.plan` foretells beside what is counted: operations and peak memory. Nothing is timed.

Memory is counted by the plan's own counter: what shows is whether the passes that a plan runs hold what a step does,
not whether the counter is right, which tests/testing/test_live_storage.py asks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

import metakern
from benchmarks.cases import CPU_CASES, Case, Problem, problem_of
from benchmarks.measure import count
from benchmarks.providers import PROVIDERS
from benchmarks.rows import Row
from benchmarks.suite_variants import TRAINED, require_transformers

PLANNED = [*CPU_CASES, *TRAINED]


@dataclass(frozen=True)
class PlanRow(Row):
    """With what was foretold; no operations of two_pass."""

    planned_gigaflops: float | None = None
    planned_megabytes: float | None = None

    @property
    def remark(self) -> str:
        figures = (
            ("GFLOP", self.planned_gigaflops, self.gigaflops),
            ("MiB", self.planned_megabytes, self.peak_megabytes),
        )
        return ", ".join(
            f"{name}: {foretold:.1f} foretold, {counted:.1f} counted"
            for name, foretold, counted in figures
            if foretold is not None and counted is not None
        )


@pytest.mark.parametrize("case", PLANNED, ids=lambda case: case.name)
def test_plan(case: Case, collected: dict[str, list[Row]]) -> None:
    """Within a twentieth."""
    require_transformers(case)
    rows = planned_rows(case)
    collected["plan"] += rows
    assert not far_off(rows, 0.05)


def planned_rows(case: Case) -> list[PlanRow]:
    """A plain step, and metakern's: by reusing what it kept, by two passes, and where ghost serves by quarters."""
    problem = problem_of(case)
    plan = metakern.plan(problem.model, problem.batch, problem.meta_batch)
    assert plan.memory is not None
    rows = [
        _row(problem, "plain", plan.memory.plain, lambda _: plan.plain_flops),
        _row(problem, "metakern", plan.memory.reuse, plan.step_flops),
        _row(problem, "metakern two_pass", plan.memory.two_pass, None),
    ]
    if plan.engine == "ghost":
        parts = metakern.plan(problem.model, problem.batch, problem.meta_batch, micro_batch=max(1, case.n // 4))
        assert parts.memory is not None
        rows.append(_row(problem, "metakern micro_batch=n/4", parts.memory.reuse, None))
    problem.model.zero_grad(set_to_none=True)
    return rows


def _row(
    problem: Problem, way: str, peak_foretold: int, operations_foretold: Callable[[float], float] | None
) -> PlanRow:
    """Operations by the share of the batch that was kept; by parts they depend on which examples were."""
    step = PROVIDERS[way](problem)
    step()
    outcome, operations, peak = count(step, "cpu")
    kept = None if outcome.weights is None else float((outcome.weights > 0).double().mean())
    dtype = str(problem.case.dtype).removeprefix("torch.")
    return PlanRow(
        *(problem.case.name, problem.case.shapes, dtype, way, "counted", outcome.engine, kept),
        gigaflops=operations / 1e9,
        peak_megabytes=peak / 2**20,
        planned_gigaflops=None if operations_foretold is None else operations_foretold(kept or 0) / 1e9,
        planned_megabytes=peak_foretold / 2**20,
    )


def far_off(rows: list[PlanRow], share: float) -> list[str]:
    """What was foretold too high or too low by more than this share."""
    return [
        f"{row.case} {row.provider}: {foretold:.4g} foretold, {counted:.4g} counted"
        for row in rows
        for foretold, counted in (
            (row.planned_gigaflops, row.gigaflops),
            (row.planned_megabytes, row.peak_megabytes),
        )
        if foretold is not None and counted and abs(foretold / counted - 1) > share
    ]
