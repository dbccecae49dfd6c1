"""`python -m benchmarks.gpu`: everything that is measured on a GPU, in one command and under eight minutes.

Operators, then steps (some of them as CUDA graphs) and meta-steps; what waits for inductor comes last.
Rows go to $OUT where that is set (a folder), else to benchmarks/results/, as soon as there are any, so that what stops
the run takes nothing away. A case that breaks the GPU's process gets its row, and the rest goes on in a new process.
Without a GPU the same code runs at small sizes, to show that the command is ready; those rows are printed, never kept.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CPU_CASES, META_CASES, Case
from benchmarks.gpu_ops import OpCase, broken, compiled_composition, described, line, measure_op, op_cases, row_of
from benchmarks.meta_steps import META_STEPS
from benchmarks.meta_ways import MetaCase, compare_meta
from benchmarks.providers import CAPTURED_PROVIDERS, COMPILED_PEERS, COMPILED_PROVIDERS
from benchmarks.real_cases import real_cases
from benchmarks.rows import RESULTS, append
from benchmarks.ways import Subject, compare, table

MINUTES = 7.0
SECONDS = {"ops": 2.0, "steps": 6.0, "meta-steps": 5.0, "compiled": 25.0, "ops-compiled": 1.5}
"""What a case of each suite is given, all together some seven minutes; with less it is not begun."""

CAPTURED = ("lenet-100-10", "mlp-256-16", "resnet-32-gn-128-16", "resnet-32-bn-128-16")
COMPILED = ("llama-130m-12-2", "resnet-32-gn-128-16", "resnet-32-bn-128-16")
COMPILED += ("resnet-32-gn-100-100", "resnet-32-bn-100-100")
PEERS_COMPILED = ("resnet-32-gn-128-16",)
"""Where inductor is done with them in a minute, and neither of them stops."""
META = ("resnet-32-gn-128-16", "transformer-64-8")

AnyCase = OpCase | Case | MetaCase
Measure = Callable[[Any, str, float], Iterator[Any]]


def _small(case: Case) -> Case:
    """A case of the CPU suite with few examples, for the dry run."""
    return replace(case, n=8, m=2)


def operator_rows(case: OpCase, device: str, seconds: float) -> Iterator[Any]:
    for row in measure_op(case, device):
        print(line(row), flush=True)
        yield row


def compiled_operator_rows(case: OpCase, device: str, seconds: float) -> Iterator[Any]:
    row = compiled_composition(case, device)
    print(line(row), flush=True)
    yield row


def step_rows(case: Case, device: str, seconds: float) -> Iterator[Any]:
    captured = list(CAPTURED_PROVIDERS) if case.name in CAPTURED else []
    yield from _shown(compare(case, device=device, seconds=min(10.0, seconds / 3), also=captured))


def compiled_rows(case: Case, device: str, seconds: float) -> Iterator[Any]:
    """The time goes into compiling, so little of it is left for steps."""
    ways = ["metakern", *COMPILED_PROVIDERS, *(COMPILED_PEERS if case.name in PEERS_COMPILED else ())]
    torch._dynamo.reset()
    yield from _shown(compare(case, device=device, seconds=min(3.0, seconds / 10), only=ways))


def meta_step_rows(case: MetaCase, device: str, seconds: float) -> Iterator[Any]:
    yield from _shown(compare_meta(case, device=device, seconds=min(5.0, seconds / 3)))


def _shown(rows: list[Any]) -> list[Any]:
    print(table(rows), flush=True)
    return rows


def not_measured(case: AnyCase, reason: str) -> Any:
    """The row of a case that could not be measured."""
    status = f"not measured: {reason}"
    if isinstance(case, OpCase):
        return replace(row_of(case, status), impl="all")
    subject = case.subject if isinstance(case, MetaCase) else Subject(case.name, case.shapes, case.dtype)
    return subject.row("all", status)


def work(small: bool, only: str) -> list[tuple[str, AnyCase, Measure]]:
    """Suite, case, and how it is measured: what takes long comes last."""
    steps = [*real_cases(small), *(map(_small, CPU_CASES) if small else CPU_CASES)]
    steps.sort(key=lambda case: case.name not in CAPTURED)
    by_name = {case.name: case for case in (*(map(_small, META_CASES) if small else META_CASES), *steps)}
    items: list[tuple[str, AnyCase, Measure]] = [
        *(("ops", case, operator_rows) for case in op_cases(small)),
        *(("steps", case, step_rows) for case in steps),
        *(("meta-steps", MetaCase(step, by_name[name]), meta_step_rows) for name in META for step in META_STEPS),
        *(("compiled", by_name[name], compiled_rows) for name in COMPILED),
        *(("ops-compiled", case, compiled_operator_rows) for case in op_cases(small)),
    ]
    return [item for item in items if only in (item[1].operator if isinstance(item[1], OpCase) else item[1].name)]


def shares(suites: list[str], seconds: float) -> Iterator[tuple[float, float]]:
    """For each case of these suites: its share of what is left when it begins, and the seconds kept for later suites.

    So a suite that takes longer than it is given loses its own last cases, and none of another.
    """
    whole = sum(SECONDS[suite] for suite in suites)
    for place, suite in enumerate(suites):
        later = suites[place:]
        kept = sum(SECONDS[other] for other in later if other != suite)
        yield SECONDS[suite] / sum(SECONDS[other] for other in later), seconds * kept / whole


def main() -> None:
    parser = argparse.ArgumentParser(description="operators and steps on a GPU, also captured and compiled")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", default="", help="measure the operators and cases whose name contains this")
    parser.add_argument("--start", type=int, default=0, help="leave out so many cases")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    deadline = time.perf_counter() + 60 * options.minutes
    items = work(device == "cpu", options.only)[options.start :]
    plan = shares([suite for suite, _, _ in items], 60 * options.minutes)
    for place, ((suite, case, measure), (share, kept)) in enumerate(zip(items, plan, strict=True), options.start):
        left = deadline - time.perf_counter()
        keep = _Keep(device, suite)
        if left - kept < SECONDS[suite]:
            keep(not_measured(case, "out of time"))
            continue
        try:
            for row in measure(case, device, share * left):
                keep(row)
        except Exception as error:  # of whatever kind: the other cases are measured all the same
            keep(not_measured(case, described(error)))
        if broken(device):
            _go_on_in_a_new_process(place + 1, options.only, deadline)
        if device == "cuda":
            torch.cuda.empty_cache()
    if device == "cpu":
        print("no GPU here: a dry run at small sizes, nothing is kept; on a GPU these rows are not measured yet")


class _Keep:
    """Writes a row to the file of its suite as soon as there is one."""

    def __init__(self, device: str, suite: str) -> None:
        self.device, self.suite = device, suite

    def __call__(self, row: Any) -> None:
        if "not measured" in row.status:
            print(getattr(row, "operator", None) or row.case, row.status, flush=True)
        if self.device == "cuda":
            append([row], self.device, self.suite, Path(os.environ.get("OUT", RESULTS)))


def _go_on_in_a_new_process(start: int, only: str, deadline: float) -> None:
    left = (deadline - time.perf_counter()) / 60
    print(f"the GPU takes no more work from this process: going on with case {start} in a new one", flush=True)
    options = ["--minutes", f"{left:.2f}", "--only", only, "--start", str(start)]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *options])


if __name__ == "__main__":
    # cuDNN would take TF32 where it sees fit, which the checks do not allow it, and no other product here does.
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"
    main()
