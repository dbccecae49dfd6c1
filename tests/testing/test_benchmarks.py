"""The benchmarks run: what is measured is checked first, and the GPU's command is ready before there is a GPU."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: list[str], timeout: int = 120) -> str:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", *code], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.mark.slow
def test_dry_run_of_the_gpu_command() -> None:
    printed = run(["-m", "benchmarks.gpu", "--only", "vit", "--minutes", "0.2"])
    rows = {line[34:70].strip(): line for line in printed.splitlines()[1:]}
    wrong = [way for way, line in rows.items() if "over the error budget" in line and "finite difference" not in way]
    assert not wrong, printed
    assert "not measured yet" in printed or "rows in" in printed
    for provider in ("plain", "metakern", "metakern two_pass", "vmap", "jvp (math)"):
        assert provider in rows, printed


GATE_AND_ROWS = """
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import providers
from benchmarks.cases import CPU_CASES, problem_of
from benchmarks.gate import Gate
from benchmarks.providers import Outcome
from benchmarks.rows import Row, append

problem = problem_of(replace(CPU_CASES[0], n=20, m=3))
gate, step = Gate(problem), providers.double_backward(problem)
outcome = step()
assert gate.judge(outcome).green
wrong = Outcome(outcome.dots + 1e-3 * outcome.dots.abs().max(), outcome.weights)
assert not gate.judge(wrong).green
next(problem.model.parameters()).grad.mul_(1.001)
assert not gate.judge(outcome).green

kept = float((outcome.weights > 0).float().mean())
for _ in range(2):
    append([Row("case", "n=1", "float32", "plain", "measured", kept=kept)], "cpu", "steps", Path(sys.argv[1]))
"""


def test_gate_and_rows(tmp_path: Path) -> None:
    """Nothing wrong comes through; labels keep the share they are made to keep; rows say where they are from."""
    run(["-c", GATE_AND_ROWS, str(tmp_path)])
    with (tmp_path / "steps-cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert 0.2 <= float(rows[0]["kept"]) <= 0.6
    for key in ("date", "commit", "dirty", "device", "threads", "torch", "dtype", "shapes"):
        assert rows[0][key], key
