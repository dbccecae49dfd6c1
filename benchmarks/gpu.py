"""`python -m benchmarks.gpu`: everything that is measured on a GPU, in one command and under eight minutes.

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

from benchmarks.cases import CPU_CASES, Case
from benchmarks.gpu_ops import OpCase, broken, described, line, measure_op, op_cases, row_of
from benchmarks.real_cases import real_cases
from benchmarks.rows import RESULTS, append
from benchmarks.ways import Subject, compare, table

MINUTES = 7.0
SHARE_OF_OPERATORS = 0.3
LEAST_SECONDS = 10.0
"""Left for a case, below which it is not begun."""


def _small(case: Case) -> Case:
    """A case of the CPU suite with few examples, for the dry run."""
    return replace(case, n=8, m=2)


def operator_rows(case: OpCase, device: str, seconds: float) -> Iterator[Any]:
    for row in measure_op(case, device):
        print(line(row), flush=True)
        yield row


def step_rows(case: Case, device: str, seconds: float) -> Iterator[Any]:
    rows = compare(case, device=device, seconds=min(10.0, seconds / 3))
    print(table(rows), flush=True)
    yield from rows


Measure = Callable[[Any, str, float], Iterator[Any]]


def not_measured(case: OpCase | Case, reason: str) -> Any:
    """The row of a case that could not be measured."""
    status = f"not measured: {reason}"
    if isinstance(case, OpCase):
        return replace(row_of(case, status), impl="all")
    return Subject(case.name, case.shapes, case.dtype).row("all", status)


def work(small: bool, only: str) -> list[tuple[str, OpCase | Case, Measure]]:
    """Suite, case, and how it is measured: operators first."""
    steps = [*real_cases(small), *(map(_small, CPU_CASES) if small else CPU_CASES)]
    items: list[tuple[str, OpCase | Case, Measure]] = [("ops", case, operator_rows) for case in op_cases(small)]
    items += [("steps", case, step_rows) for case in steps]
    return [item for item in items if only in (item[1].operator if isinstance(item[1], OpCase) else item[1].name)]


def main() -> None:
    parser = argparse.ArgumentParser(description="operators on a GPU, and re-weighted steps in plain steps")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", default="", help="measure the operators and cases whose name contains this")
    parser.add_argument("--start", type=int, default=0, help="leave out so many cases")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    deadline = time.perf_counter() + 60 * options.minutes
    for_steps = (1 - SHARE_OF_OPERATORS) * 60 * options.minutes
    items = work(device == "cpu", options.only)
    for place, (suite, case, measure) in enumerate(items):
        if place < options.start:
            continue
        left = deadline - time.perf_counter()
        keep = _Keep(device, suite)
        if left - (for_steps if suite == "ops" else 0) < LEAST_SECONDS:
            keep(not_measured(case, "out of time"))
            continue
        try:
            for row in measure(case, device, left / (len(items) - place)):
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
    main()
