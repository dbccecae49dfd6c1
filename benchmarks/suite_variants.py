"""A whole re-weighted step compiled, with rounded dots, and of models that people train, at sizes for a CPU."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import CPU_CASES, Case, problem_of
from benchmarks.providers import COMPILED_PROVIDERS, ours, ours_rounded
from benchmarks.real_cases import real_cases
from benchmarks.rows import Row
from benchmarks.ways import compare

STEPS = {case.name: case for case in CPU_CASES}
REAL = {case.name: case for case in real_cases(small=False)}
BERT = replace(REAL["bert-base-32-8"], name="bert-base-4-1, 64 tokens", shape=(64,), n=4, m=1)
SENTENCES: dict[str, Any] = dict(shape=(32,), targets=(32,), n=4, m=1)

COMPILED = [
    *(STEPS[name] for name in ("lenet-100-10", "mlp-256-16", "conv-64-16", "conv-bn-64-16", "sdpa-64-4")),
    REAL["resnet-32-bn-128-16"],
    BERT,
]
ROUNDED = [STEPS[name] for name in ("mlp-256-16", "conv-64-16", "transformer-64-4", "sdpa-64-4")]
# Of the large ones few examples, so that a plain step stays near a second on two cores.
TRAINED = [
    REAL["resnet-32-gn-128-16"],
    REAL["resnet-32-bn-128-16"],
    REAL["resnet-32-gn-100-100"],
    replace(REAL["wrn-28-10-128-16"], name="wrn-28-10-4-1", n=4, m=1),
    replace(REAL["vit-s-64-8"], name="vit-s-4-1", n=4, m=1),
    BERT,
    replace(REAL["gpt2-124m-16-2"], name="gpt2-124m-4-1, 32 tokens", **SENTENCES),
    replace(REAL["llama-130m-12-2"], name="llama-130m-4-1, 32 tokens", **SENTENCES, dtype=torch.float32),
]


@dataclass(frozen=True)
class RoundedRow(Row):
    """With what rounding does to the weights of the step."""

    weight_moved: float | None = None  # half the sum of |w - w exact|: the share of the whole weight of one
    kept_otherwise: int | None = None  # examples kept by one and dropped by the other


@dataclass(frozen=True)
class CompiledRow(Row):
    """With what compiling it took, of the compilers' time as well: processor seconds, with an empty cache."""

    compile_seconds: float | None = None


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.name)
def test_compiled(
    case: Case, collected: dict[str, list[Row]], seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once to see what that takes, and once more from the cache for the steps."""
    require_transformers(case)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    taken = compile_seconds(case)
    rows = _measured(case, seconds, ["plain compiled", "metakern", "metakern compiled"])
    collected["compiled"] += [CompiledRow(**vars(row), compile_seconds=taken.get(row.provider)) for row in rows]


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.name)
def test_rounded(case: Case, collected: dict[str, list[Row]], seconds: float) -> None:
    rows = _measured(case, seconds, ["metakern", "metakern bf16 dots"])
    collected["precision"] += [rounded_row(case, row) for row in rows]


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_real(case: Case, collected: dict[str, list[Row]], seconds: float) -> None:
    require_transformers(case)
    ways = ["double_backward (short)", "double_backward (short, math)", "metakern", "metakern two_pass"]
    collected["real"] += _measured(case, seconds, ways[:3] if case.interacting else ways)


def require_transformers(case: Case) -> None:
    if case.name.startswith(("bert", "gpt2")):
        pytest.importorskip("transformers")


def compile_seconds(case: Case) -> dict[str, float]:
    problem, taken = problem_of(case), {}
    for name, make in COMPILED_PROVIDERS.items():
        torch._dynamo.reset()
        with torch._inductor.config.patch(compile_threads=1):  # in this process, whose time is known
            started = sum(os.times()[:4])
            make(problem)()
            taken[name] = sum(os.times()[:4]) - started
    torch._dynamo.reset()
    return taken


def rounded_row(case: Case, row: Row) -> RoundedRow:
    if "bf16" not in row.provider:
        return RoundedRow(**vars(row))
    problem = problem_of(case)
    exact, rounded = ours(problem)().weights, ours_rounded(problem)().weights
    assert exact is not None
    assert rounded is not None
    moved = (exact - rounded).abs().sum() / 2
    return RoundedRow(**vars(row), weight_moved=float(moved), kept_otherwise=int(((exact > 0) != (rounded > 0)).sum()))


def _measured(case: Case, seconds: float, ways: list[str]) -> list[Row]:
    """No time is asserted; that metakern's numbers are right is."""
    rows = compare(case, seconds=seconds, only=ways)
    failed = [row for row in rows if row.provider.startswith("metakern") and not row.measured]
    assert not failed, "; ".join(f"{row.provider}: {row.status}" for row in failed)
    return rows
