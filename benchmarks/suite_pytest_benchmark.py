"""The plain and the re-weighted step by pytest-benchmark itself: milliseconds, to save and compare with its options.

    pytest benchmarks/suite_pytest_benchmark.py --benchmark-autosave
    pytest benchmarks/suite_pytest_benchmark.py --benchmark-compare

Its steps run one after the other, so a machine that changes its speed shows in their ratio; that is what the rounds in
turns of `suite_steps.py` are for.
"""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cases import CPU_CASES, Case, Problem, problem_of
from benchmarks.providers import Step, ours, plain

ROUNDS = 10


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("way", [plain, ours], ids=["plain", "l2rw_step"])
def test_call(case: Case, way: Callable[[Problem], Step], benchmark: Any) -> None:
    benchmark.group = case.name
    benchmark.extra_info["shapes"] = case.shapes
    benchmark.pedantic(way(problem_of(case)), rounds=ROUNDS, warmup_rounds=2)
