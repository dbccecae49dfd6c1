"""Whole re-weighted steps: every case, every provider, interleaved."""

import pytest

from benchmarks.cases import CPU_CASES, SCALING, Case
from benchmarks.rows import Row
from benchmarks.ways import compare


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_step(case: Case, collected: dict[str, list[Row]], seconds: float, providers: list[str] | None) -> None:
    """No time is asserted; that metakern's numbers are right is."""
    rows = compare(case, seconds=seconds, only=providers, also=["metakern compiled"])
    collected["steps"].extend(rows)
    _require_ours(case, rows)


@pytest.mark.parametrize("case", SCALING, ids=lambda case: case.name)
def test_scaling(case: Case, collected: dict[str, list[Row]], seconds: float) -> None:
    """The same step as one size grows; at a fifth of the time each."""
    rows = compare(case, seconds=seconds / 5, only=["double_backward (short)", "metakern", "metakern two_pass"])
    collected["scaling"].extend(rows)
    _require_ours(case, rows)


def _require_ours(case: Case, rows: list[Row]) -> None:
    """metakern answers every case; those whose examples interact not in parts, which are another problem."""
    ours = [row for row in rows if row.provider.startswith("metakern")]
    unserved = ("metakern micro_batch=n/4",) if case.interacting else ()
    failed = [row for row in ours if not row.measured and row.provider not in unserved]
    assert not failed, "; ".join(f"{row.provider}: {row.status}" for row in failed)
