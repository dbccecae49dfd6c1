"""Whole re-weighted steps: every case, every provider, interleaved."""

import pytest

from benchmarks.cases import CPU_CASES, Case
from benchmarks.compare import compare
from benchmarks.rows import Row


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_step(case: Case, benchmark, collected: list[Row], request: pytest.FixtureRequest) -> None:
    """No time is asserted; that metakern's numbers are right is."""
    seconds = request.config.getoption("--seconds")
    only = request.config.getoption("--providers").split(",") if request.config.getoption("--providers") else None
    keywords = {"seconds": seconds, "only": only}
    rows = benchmark.pedantic(compare, args=(case,), kwargs=keywords, rounds=1, iterations=1)
    collected.extend(rows)
    benchmark.extra_info.update({row.provider: row.ratio for row in rows})
    failed = [row for row in rows if row.provider.startswith("metakern") and not row.measured]
    assert not failed, "; ".join(f"{row.provider}: {row.status}" for row in failed)
