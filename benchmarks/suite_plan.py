"""What `metakern.plan` foretells beside what is counted: operations and peak memory. Nothing is timed."""

from dataclasses import dataclass

import pytest

import metakern
from benchmarks.cases import CPU_CASES, Case, problem_of
from benchmarks.measure import count
from benchmarks.providers import PROVIDERS
from benchmarks.rows import Row
from benchmarks.suite_variants import TRAINED

PLANNED = [*CPU_CASES, *TRAINED]


@dataclass(frozen=True)
class PlanRow(Row):
    """With what was foretold; no operations of two_pass, no memory of forward mode."""

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
    """Within a tenth."""
    if "bert" in case.name:
        pytest.importorskip("transformers")
    rows = planned_rows(case)
    collected["plan"] += rows
    assert not far_off(rows, 0.1)


def planned_rows(case: Case) -> list[PlanRow]:
    """A plain step, and metakern's by reusing what it kept and by two passes."""
    problem = problem_of(case)
    plan = metakern.plan(problem.model, problem.batch, problem.meta_batch)
    peaks = plan.memory
    planned = {"plain": peaks and peaks.plain, "metakern": peaks and peaks.reuse}
    if peaks is not None:
        planned["metakern two_pass"] = peaks.two_pass
    rows = []
    for way, peak_foretold in planned.items():
        step = PROVIDERS[way](problem)
        step()
        outcome, operations, peak = count(step, "cpu")
        kept = None if outcome.weights is None else float((outcome.weights > 0).double().mean())
        foretold = {"plain": plan.plain_flops, "metakern": plan.step_flops(kept or 0)}.get(way)
        rows.append(
            PlanRow(
                *(case.name, case.shapes, str(case.dtype).removeprefix("torch."), way, "counted", outcome.engine, kept),
                gigaflops=operations / 1e9,
                peak_megabytes=peak / 2**20,
                planned_gigaflops=None if foretold is None else foretold / 1e9,
                planned_megabytes=None if peak_foretold is None else peak_foretold / 2**20,
            )
        )
    problem.model.zero_grad(set_to_none=True)
    return rows


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
