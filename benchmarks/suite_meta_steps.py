"""Weight nets, label correction and MetaBalance, beside the same step by differentiating through its virtual step."""

import pytest

from benchmarks.cases import META_CASES
from benchmarks.meta_steps import META_STEPS
from benchmarks.meta_ways import MetaCase, compare_meta
from benchmarks.rows import Row

MEASURED = [MetaCase(step, case) for step in META_STEPS for case in META_CASES]


@pytest.mark.parametrize("meta", MEASURED, ids=lambda meta: meta.name)
def test_meta_step(
    meta: MetaCase, collected: dict[str, list[Row]], seconds: float, providers: list[str] | None
) -> None:
    """No time is asserted; that metakern's numbers are right is, but for a difference quotient's."""
    rows = compare_meta(meta, seconds=seconds / 2, only=providers, also=list(meta.step.compiled))
    collected["meta-steps"].extend(rows)
    ours = [row for row in rows if row.provider.startswith("metakern") and "difference" not in row.provider]
    failed = [row for row in ours if not row.measured]
    assert not failed, "; ".join(f"{row.provider}: {row.status}" for row in failed)
