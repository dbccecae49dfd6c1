"""Random programs against autograd, by every engine."""

from __future__ import annotations

from typing import Any

import pytest

import metakern
from metakern.testing.judge import judge_step
from tests.step.random_programs import program

BLOCK = 50
OTHERWISE = [{"engine": "jvp"}, {"engine": "double_backward"}, {"memory": "two_pass"}]


def judge(seed: int, **keywords: Any) -> str:
    """The engine that served, exactly."""
    setup, pieces = program(seed)
    try:
        return judge_step(metakern.l2rw_step, setup, **keywords).result.engine
    except Exception as error:
        raise AssertionError(f"program {seed} ({', '.join(pieces)}): {error}") from error


@pytest.mark.parametrize("block", range(8))
def test_random_programs(block: int) -> None:
    engines = [judge(seed) for seed in range(block * BLOCK, (block + 1) * BLOCK)]
    assert set(engines) == {"ghost", "jvp"}
    assert engines.count("ghost") > BLOCK / 2


@pytest.mark.parametrize("keywords", OTHERWISE, ids=str)
def test_random_programs_otherwise(keywords: dict[str, Any]) -> None:
    for seed in range(1000, 1000 + 2 * BLOCK):
        judge(seed, **keywords)
