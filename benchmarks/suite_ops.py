"""Each operator beside its composition of torch calls, and beside the same compiled where inductor works."""

from dataclasses import replace

import pytest
import torch

from benchmarks.operators import OPERATORS, OperatorCase, judge, ways
from benchmarks.rows import Row
from benchmarks.ways import Subject, measured


def of_one_call(row: Row, calls: int) -> Row:
    """The row of a step of several calls as that of one."""
    return replace(
        row,
        milliseconds=None if row.milliseconds is None else row.milliseconds / calls,
        gigaflops=None if row.gigaflops is None else row.gigaflops / calls,
    )


@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.name)
def test_operator(case: OperatorCase, collected: dict[str, list[Row]], seconds: float) -> None:
    """No time is asserted; that the operator is right is."""
    subject = Subject(case.name, case.shapes, torch.float32)
    rows = measured(subject, ways(case), judge(case), unit="composition", seconds=seconds / 5)
    collected["ops"].extend(of_one_call(row, case.calls) for row in rows)
    assert rows[-1].measured, rows[-1].status
