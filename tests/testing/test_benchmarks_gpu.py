"""The GPU's command, run dry: every way has its place, its time and its row before there is a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_ops, providers, ways
from benchmarks.cases import CPU_CASES
from benchmarks.meta_ways import MetaCase
from metakern.testing import models


def rows_of(only: str, minutes: str, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str, str], str]:
    """Status by suite, case and way of what the command would keep."""
    found: dict[tuple[str, str, str], str] = {}

    def keep(self: gpu._Keep, row: ways.Row | gpu_ops.OpRow) -> None:
        case, way = (row.operator, row.impl) if isinstance(row, gpu_ops.OpRow) else (row.case, row.provider)
        found[self.suite, case, way] = row.status

    monkeypatch.setattr(gpu._Keep, "__call__", keep)
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", only, "--minutes", minutes])
    gpu.main()
    return found


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes the graphs")
def test_graphs_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows_of("lenet", "0.5", monkeypatch)
    assert found["steps", "lenet-100-10", "metakern"] == "measured"
    for way in ("plain captured", "metakern captured"):
        assert found["steps", "lenet-100-10", way] == "not run: needs CUDA"


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_cudnn")
def test_captured_steps_are_right() -> None:
    case = replace(CPU_CASES[0], n=20, m=4)
    rows = ways.compare(case, device="cuda", seconds=0.0, only=[*providers.CAPTURED_PROVIDERS])
    assert len(rows) == 3
    assert all(row.measured for row in rows), rows


@pytest.mark.slow
def test_meta_steps_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(CPU_CASES[1], name="transformer-64-8", shape=(16,), build=lambda: models.mlp(16, 2))
    monkeypatch.setattr(gpu, "META_CASES", [small])
    found = rows_of("transformer-64-8", "2", monkeypatch)
    for step in ("mwnet", "mlc", "metabalance"):
        for way in ("plain", "metakern", "double_backward (published)"):
            assert found["meta-steps", f"{step} transformer-64-8", way] == "measured", found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # inductor's own
def test_compositions_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows_of("clip_normalise", "1", monkeypatch)
    assert found.get(("ops-compiled", "clip_normalise", "composition compiled")) == "measured", found


def test_a_compiled_composition_that_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in gpu_ops.op_cases(small=True) if case.operator == "row_dots")
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *given: 1.1 * function(*given))
    row = gpu_ops.compiled_composition(case, "cpu")
    assert row.status == "not measured: over the error budget"
    assert row.microseconds is None


def test_every_case_is_there_and_what_takes_long_comes_last() -> None:
    for small in (True, False):
        items = gpu.work(small, "")
        suites = [suite for suite, _, _ in items]
        assert list(dict.fromkeys(suites)) == list(gpu.SECONDS)
        assert suites == sorted(suites, key=list(gpu.SECONDS).index)
        names = {suite: [case.name for of, case, _ in items if of == suite] for suite in ("steps", "compiled")}
        assert set(gpu.CAPTURED) | set(names["compiled"]) <= set(names["steps"])
        assert {case.step.name for _, case, _ in items if isinstance(case, MetaCase)} == {"mwnet", "mlc", "metabalance"}


def test_all_cases_fit_into_the_time() -> None:
    assert sum(gpu.SECONDS[suite] for suite, _, _ in gpu.work(False, "")) <= 60 * gpu.MINUTES <= 450


def test_a_slow_suite_takes_no_time_from_the_others() -> None:
    plan = list(gpu.shares(["ops", "ops", "steps", "compiled"], 70))
    assert [kept for _, kept in plan] == [62, 62, 50, 0]
    assert plan[0][0] == pytest.approx(2 / 35)
    assert plan[-1][0] == 1


@pytest.mark.skipif(shutil.which("sh") is None, reason="no sh on PATH")
def test_what_the_script_runs(tmp_path: Path) -> None:
    """Build, report, tests, benchmarks, tiles, each whether or not the one before has failed."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1$2" in -c*) echo 90;; *) echo "$METAKERN_CUDA_ARCHS $*"; exit 1;; esac\n')
    python.chmod(0o755)
    given = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(python), "MINUTES": "2"}
    given.pop("METAKERN_CUDA_ARCHS", None)
    script = Path(gpu.__file__).with_suffix(".sh")
    said = subprocess.run(["sh", script], env=given, capture_output=True, text=True, check=False).stdout.splitlines()
    modules = [re.search(r"90 -m (\S+)", line)[1] for line in said]  # pyright: ignore
    assert modules == ["pip", "metakern.report", "pytest", "benchmarks.gpu", "benchmarks.tune"]
    assert "--minutes 2" in said[3]
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert kept == {"build.log", "report.txt", "tests.log", "benchmarks.log", "tune.log"}
