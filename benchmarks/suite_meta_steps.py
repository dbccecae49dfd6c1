"""Weight nets, label correction and MetaBalance, beside the same step by differentiating through its virtual step."""

import pytest
import torch

from benchmarks.cases import META_CASES, Case, problem_of
from benchmarks.meta_steps import META_STEPS, MetaGate, MetaStep, ways
from benchmarks.rows import Row
from benchmarks.ways import Subject, measured


@pytest.mark.parametrize("case", META_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("step", META_STEPS, ids=lambda step: step.name)
def test_meta_step(step: MetaStep, case: Case, collected: dict[str, list[Row]], seconds: float) -> None:
    """No time is asserted; that metakern's numbers are right is, but for a difference quotient's."""
    rows = meta_rows(step, case, seconds)
    collected["meta-steps"].extend(rows)
    ours = [row for row in rows if row.provider.startswith("metakern") and "difference" not in row.provider]
    failed = [row for row in ours if not row.measured]
    assert not failed, "; ".join(f"{row.provider}: {row.status}" for row in failed)


def meta_rows(step: MetaStep, case: Case, seconds: float) -> list[Row]:
    problem = problem_of(case)
    torch.manual_seed(1)
    network = step.network(case.classes) if step.network else None
    subject = Subject(f"{step.name} {case.name}", case.shapes, case.dtype)
    gate = MetaGate(step, problem, network)
    return measured(subject, ways(step, problem, network), gate.judge, unit="plain", seconds=seconds / 2)
