"""`python -m benchmarks.parts CASE ...`: where the time of a step goes, part by part, in plain steps.

Plain steps and steps of metakern in turn. A part is timed by wrapping the function that does it, so "the rest" is what
lies between: checks, the weight rule, handing over. What lies between torch's operators, Python for the most part, is
measured in runs of its own, under torch's profiler, which makes it look larger than it is.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import CPU_CASES, Problem, named, problem_of
from benchmarks.providers import Step, ours, plain
from metakern.engines import ghost, recorded

PARTS: dict[str, tuple[Any, str]] = {
    "forward": (recorded, "trace_batch"),
    "output gradients": (recorded, "visit_output_gradients"),
    "meta batch": (ghost, "_meta_pass"),
    "dots": (recorded.Recorded, "dots_along"),
    "weighted gradient": (recorded.Recorded, "weighted_gradient"),
}

# Forward mode, for examples that see each other, has none of these parts.
WITH_PARTS = [case for case in CPU_CASES if not case.interacting]

Times = dict[str, list[float]]


def parts(problem: Problem, seconds: float) -> dict[str, float]:
    """Median milliseconds: of a plain step ("plain", its "plain forward"), of ours ("metakern") and of its parts."""
    times: Times = defaultdict(list)
    steps = {"metakern": ours(problem), "plain": plain(problem)}
    for step in steps.values():
        step()
    deadline = time.perf_counter() + seconds
    with _timed_parts(times):
        while len(times["plain"]) < 5 or time.perf_counter() < deadline:
            for name, step in steps.items():
                _note(times[name], step)
            _note(times["plain forward"], lambda: problem.losses(problem.batch).mean())
    found = {name: statistics.median(values) for name, values in times.items()}
    found["the rest"] = found["metakern"] - sum(found[part] for part in PARTS)
    for name, step in steps.items():
        found[f"{name}, between operators"] = statistics.median(_between_operators(step) for _ in range(5))
    return found


def _note(values: list[float], step: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = step()
    values.append(1e3 * (time.perf_counter() - start))
    return result


@contextmanager
def _timed_parts(times: Times) -> Iterator[None]:
    undo = []
    for part, (owner, name) in PARTS.items():
        original = getattr(owner, name)

        def timed(*args: Any, _part: str = part, _original: Any = original, **kwargs: Any) -> Any:
            return _note(times[_part], lambda: _original(*args, **kwargs))

        undo.append(patch.object(owner, name, timed))
        undo[-1].start()
    try:
        yield
    finally:
        for each in undo:
            each.stop()


def _between_operators(step: Step) -> float:
    """Milliseconds of a step in which no operator ran on the calling thread."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        step()
        whole = time.perf_counter() - start
    events = found.events() or []
    busy = sum(event.cpu_time_total for event in events if event.cpu_parent is None and "::" in event.name)
    return 1e3 * whole - busy / 1e3


def line(name: str, found: dict[str, float]) -> str:
    """One row of a Markdown table, in plain steps."""
    shown = ("metakern", *PARTS, "the rest", "metakern, between operators", "plain forward", "plain, between operators")
    return (
        f"| {name} | {found['plain']:.1f} | " + " | ".join(f"{found[key] / found['plain']:.2f}" for key in shown) + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="where the time of a step goes, in plain steps")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all that have these parts without it")
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()
    try:
        cases = named(options.cases, WITH_PARTS) or WITH_PARTS
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(int(os.environ.get("METAKERN_BENCH_THREADS", "2")))
    heads = ["case", "plain ms", "step", *PARTS, "rest", "between operators", "plain: forward", "between operators"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for case in cases:
        print(line(case.name, parts(problem_of(case), options.seconds)), flush=True)


if __name__ == "__main__":
    main()
