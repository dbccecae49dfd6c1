"""`python -m benchmarks.gpu`: everything that is measured on a GPU, in one command and under eight minutes.

Rows go to $OUT where that is set (a folder), else to benchmarks/results/. Without a GPU it runs the same code at small
sizes, to show that the command is ready; those rows are printed and never kept.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases import CPU_CASES, Case
from benchmarks.compare import compare, table
from benchmarks.gpu_ops import measure_ops
from benchmarks.real_cases import real_cases
from benchmarks.rows import RESULTS, Row, append

MINUTES = 7.5
SHARE_OF_OPERATORS = 0.25


def _small(case: Case) -> Case:
    """A case of the CPU suite with few examples, for the dry run."""
    return replace(case, n=8, m=2)


def measure(device: str, cases: list[Case], minutes: float) -> list[Row]:
    """All cases that the time allows; one that fails or comes too late gets a row that says so."""
    deadline = time.perf_counter() + 60 * minutes
    rows: list[Row] = []
    for place, case in enumerate(cases):
        left = deadline - time.perf_counter()
        dtype = str(case.dtype).removeprefix("torch.")
        if left < 10:
            rows.append(Row(case.name, case.shapes, dtype, "all", "not measured: out of time"))
            continue
        try:
            rows += compare(case, device=device, seconds=min(10.0, left / (len(cases) - place) / 3))
        except (ImportError, RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
            rows.append(Row(case.name, case.shapes, dtype, "all", f"not measured: {str(error).splitlines()[0][:160]}"))
        if device == "cuda":
            torch.cuda.empty_cache()
        print(table([row for row in rows if row.case == case.name]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="operators on a GPU, and re-weighted steps in plain steps")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", default="", help="measure the operators and cases whose name contains this")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = device == "cpu"
    start = time.perf_counter()
    operators = measure_ops(device, SHARE_OF_OPERATORS * options.minutes, options.only)
    cases = [*real_cases(small), *(map(_small, CPU_CASES) if small else CPU_CASES)]
    left = options.minutes - (time.perf_counter() - start) / 60
    rows = measure(device, [case for case in cases if options.only in case.name], left)
    if small:
        print("no GPU here: a dry run at small sizes, nothing is kept; on a GPU these rows are not measured yet")
    else:
        folder = Path(os.environ.get("OUT", RESULTS))
        for suite, found in (("ops", operators), ("steps", rows)):
            if found:
                print("rows in", append(found, device, suite, folder))


if __name__ == "__main__":
    main()
