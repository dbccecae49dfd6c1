"""What `metakern.plan` foretells beside what is counted: operations and peak memory. Nothing is timed."""

from dataclasses import dataclass

import pytest

import metakern
from benchmarks.cases import CPU_CASES, Case, problem_of
from benchmarks.measure import count
from benchmarks.providers import PROVIDERS
from benchmarks.rows import Row
from benchmarks.suite_variants import TRAINED

PLANNED = [case for case in (*CPU_CASES, *TRAINED) if not case.interacting]


@dataclass(frozen=True)
class PlanRow(Row):
    """With what was foretold; operations are not for two_pass."""

    planned_gigaflops: float | None = None
    planned_megabytes: float | None = None


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
    assert plan.memory is not None
    planned = {"plain": plan.memory.plain, "metakern": plan.memory.reuse, "metakern two_pass": plan.memory.two_pass}
    rows = []
    for way, megabytes in planned.items():
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
                planned_megabytes=megabytes / 2**20,
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
