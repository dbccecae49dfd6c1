"""The benchmarks run: what is measured is checked first, and the GPU's command is ready before there is a GPU."""

import csv
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare, parts
from benchmarks.cases import CPU_CASES, problem_of

ROOT = Path(__file__).parents[2]


def run(code: list[str], timeout: int = 600) -> str:
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


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no history to compare with")
def test_this_tree_beside_a_commit() -> None:
    settings = "--cases lenet-100-10 --rounds 1 --seconds 0.1 --threads 1".split()
    printed = run(["-m", "benchmarks.compare", "HEAD", *settings])
    assert printed.splitlines()[-1].startswith("lenet-100-10"), printed


def test_every_part_has_its_function() -> None:
    """A part is timed by the name of what does it, which may have moved."""
    for part, (owner, name) in parts.PARTS.items():
        assert callable(getattr(owner, name, None)), f"{part}: {owner.__name__} has no {name}"


def test_parts_of_a_step() -> None:
    problem = problem_of(replace(CPU_CASES[0], n=20, m=4))
    found = parts.parts(problem, seconds=0.0)
    assert {*parts.PARTS, "metakern", "plain", "the rest"} <= set(found)
    assert parts.line("lenet", found).count("|") == len(parts.PARTS) + 8


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (parts.main, ["lenet"], "no case 'lenet'; the cases are lenet-100-10, "),
        (parts.main, ["conv-bn-64-16"], "no case 'conv-bn-64-16'; "),  # by forward mode, which has no such parts
        (compare.main, ["HEAD", "--cases", "lenet-100-10,nets"], "no case 'nets'; the cases are lenet-100-10, "),
        (compare.main, ["no-such-branch"], "no-such-branch'"),
    ],
)
def test_unknown_names_are_answered_with_the_known(
    main: Callable[[], None],
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


REAL_CASES = """
import torch
from benchmarks.ways import compare
from benchmarks.real_cases import real_cases

torch.set_num_threads(1)
siblings = {case.name: case for case in real_cases(small=True)}
assert list(siblings) == [case.name for case in real_cases(small=False)]
for name in ("resnet-32-gn-128-16", "resnet-32-bn-128-16", "wrn-28-10-128-16", "bert-base-30-30", "gpt2-124m-16-2"):
    plain, ours = compare(siblings[name], seconds=0.0, only=["metakern"])
    assert ours.measured, ours
    assert (ours.engine == "jvp") == siblings[name].interacting, ours
"""


@pytest.mark.slow
def test_siblings_of_the_real_cases() -> None:
    """The models of the GPU's cases, small: what metakern says of them is right."""
    pytest.importorskip("transformers")
    run(["-c", REAL_CASES])


GATE_AND_ROWS = """
import sys
from dataclasses import replace
from pathlib import Path

import torch

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

alike = Outcome(weights=torch.full((20,), 1 / 20))
providers.plain(problem)()
assert gate.judge(alike).green
next(problem.model.parameters()).grad.mul_(1.001)
assert not gate.judge(alike).green

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


PUBLISHED = """
from xml.etree import ElementTree
from benchmarks.publish import RESULTS, pages, plot_files

for page, text in pages().items():
    assert page.read_text() == text, f"{page} is not what the rows give: python -m benchmarks.publish"
for name, plot in plot_files().items():
    assert (RESULTS / name).read_text() == plot, f"{name} is not what the rows give: python -m benchmarks.publish"
    ElementTree.fromstring(plot)
"""


def test_tables_and_plots_are_what_the_rows_give() -> None:
    run(["-c", PUBLISHED])


ONE_OF_EACH = """
from dataclasses import replace
import torch
from benchmarks import meta_ways
from benchmarks.cases import META_CASES, problem_of
from benchmarks.meta_gate import MetaGate
from benchmarks.meta_steps import META_STEPS
from benchmarks.meta_ways import MetaCase, compare_meta
from benchmarks.operators import OPERATORS, judge, ways
from metakern.testing import models

torch.set_num_threads(1)
case = replace(META_CASES[2], n=12, m=3, shape=(16,), build=lambda: models.mlp(16, 2))
for step in META_STEPS:
    rows = {row.provider: row for row in compare_meta(MetaCase(step, case), seconds=0.0)}
    for name in ("higher", "torchopt"):
        assert rows[name].measured or rows[name].status.startswith("not installed"), rows
    assert "metakern compiled" not in rows
    assert rows["double_backward (published)"].measured, rows
    assert rows["metakern"].measured and rows["metakern"].gradient_budget_used <= 1, rows
    assert len({row.case for row in rows.values()}) == 1

meta = MetaCase(META_STEPS[0], case)
problem, network = problem_of(case), meta.network()
gate = MetaGate(meta.step, problem, network)
outcome = meta_ways.step_of(meta_ways.ways(meta.step)["metakern"], problem, network)()
assert gate.judge(outcome).green
network[0].weight.grad.mul_(1.01)
assert not gate.judge(outcome).green

clip = next(operator for operator in OPERATORS if operator.name == "clip_normalise")
shares, made = judge(clip), ways(clip)
right = made["metakern"]()()
assert shares(right).green
assert not shares(replace(right, result=(right.result[0] * 1.001,))).green
"""


def test_meta_steps_and_operators_are_checked() -> None:
    """The published sequence of each step runs and agrees with metakern's; a wrong operator gets no time."""
    run(["-c", ONE_OF_EACH])


OPERATORS = """
import torch
from benchmarks.operators import OPERATORS, judge, ways

torch.set_num_threads(1)
for operator in OPERATORS:
    shares, made = judge(operator), ways(operator)
    for way in ("composition", "metakern"):
        assert shares(made[way]()()).green, (operator.name, way)
"""


def test_every_operator_agrees_with_its_composition() -> None:
    run(["-c", OPERATORS])


RESHAPED = """
from dataclasses import replace
import torch
from torch import nn
from benchmarks import providers
from benchmarks.cases import CPU_CASES, problem_of
from benchmarks.measure import count

class Rows(nn.Module):
    def forward(self, x):
        return x.unflatten(1, (4, -1)).transpose(0, 1).reshape(4, len(x), -1).transpose(0, 1).flatten(1)

torch.set_num_threads(1)
model = lambda: nn.Sequential(nn.Linear(1024, 1024), Rows(), nn.Linear(1024, 1024), nn.Linear(1024, 10))
problem = problem_of(replace(CPU_CASES[1], n=32, m=2, shape=(1024,), build=model))
counts = []
for way in ("plain", "metakern"):
    step = providers.PROVIDERS[way](problem)
    step()
    counts.append(count(step, "cpu")[1:])
assert count(step, "cpu")[1:] == counts[1]
assert counts[1][0] < counts[0][0], counts  # by pairs; the proof alone would take several plain steps
"""


def test_what_is_counted_is_a_settled_step() -> None:
    """A reshape is another view to a pass that is counted, and the proof of such a pass is no part of a step."""
    run(["-c", RESHAPED])


FLOPS = """
from dataclasses import replace
import torch
from benchmarks import providers
from benchmarks.cases import CPU_CASES, problem_of
from benchmarks.measure import count

torch.set_num_threads(1)
by_name = {case.name: case for case in CPU_CASES}
for name, passes, n, m in (("mlp-256-16", 2, 32, 2), ("conv-64-16", 3, 8, 2), ("transformer-32-8", 3, 8, 8)):
    problem = problem_of(replace(by_name[name], n=n, m=m))
    counts = {}
    for way in ("plain", "metakern"):
        step = providers.PROVIDERS[way](problem)
        step()
        outcome, counts[way], _ = count(step, "cpu")
    kept = float((outcome.weights > 0).double().mean())
    floor = (passes + kept) / 3 + m / n
    assert abs(counts["metakern"] / counts["plain"] / floor - 1) < 0.05, (name, counts, floor)
"""


def test_operations_are_those_of_the_cost_model() -> None:
    """Passes over the matrices: 2 + kept by pairs, 3 + kept by direction, of 3 in a plain step, and m/n of one."""
    run(["-c", FLOPS])


PLANS = """
from dataclasses import replace
import torch
from benchmarks.cases import CPU_CASES
from benchmarks.suite_plan import far_off, planned_rows

torch.set_num_threads(1)
by_name = {case.name: case for case in CPU_CASES}
sizes = {"lenet-100-10": 16, "mlp-256-16": 64, "conv-128-10": 16, "transformer-64-4": 8, "sdpa-32-8": 8}
for name, n in sizes.items():
    rows = planned_rows(replace(by_name[name], n=n, m=4))
    assert not far_off(rows, 0.1), far_off(rows, 0.1)
"""


def test_plans_are_what_is_counted() -> None:
    run(["-c", PLANS])


PEERS = """
from dataclasses import replace
import sys
import torch
from benchmarks.cases import CPU_CASES
from benchmarks.ways import compare
from benchmarks.peers import PEERS
from metakern.testing import models

torch.set_num_threads(1)
sys.modules["opacus"] = None  # as if it were not installed
case = replace(CPU_CASES[0], n=6, m=2, shape=(8,), build=lambda: models.mlp(8, 1))
rows = {row.provider: row.status for row in compare(case, seconds=0.0, only=["metakern", *PEERS])}
assert rows["opacus"].startswith("not installed: opacus"), rows
for name in ("metakern", "backpack", "higher", "torchopt"):
    assert rows[name] == "measured" or rows[name].startswith("not installed"), rows
"""


def test_peers_agree_or_are_named() -> None:
    """A library that is not there is skipped by name; the exact ones pass the check."""
    run(["-c", PEERS])
