"""Time of steps, interleaved in one run.

Apart from `measure`, which needs today's counter of memory: `compare` times commits from before it.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds, and the ratio to the unit in the same round: median and the 20th and 80th percentile.

    `processor_ratio` is the same in processor time of the whole process: on a busy machine the figure to look at.
    """

    milliseconds: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    processor_ratio: float
    rounds: int


def interleaved(steps: dict[str, Callable[[], Any]], *, unit: str, seconds: float, device: str) -> dict[str, Timing]:
    """Time all steps in turn, round after round, until `seconds` are spent (at least five rounds).

    The order rotates from round to round, and each step is divided by the unit of its own round: what slows the machine
    down for a while slows both. A step that has run twice and for a third of the time sits out the later rounds, so
    that slow ones do not eat the time of all. The steps must have run before.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    with _little_to_collect():
        started, rounds = time.perf_counter(), 0
        while rounds < 5 or (time.perf_counter() - started < seconds and rounds < 200):
            running = [name for name in steps if name == unit or _has_time_left(times[name], 1e3 * seconds / 3)]
            shift = rounds % len(running)
            for name in running[shift:] + running[:shift]:
                times[name].append(_timed(steps[name], device))
            rounds += 1
    return {name: _summary(values, times[unit]) for name, values in times.items()}


@contextmanager
def _little_to_collect() -> Iterator[None]:
    """Inside the block the collector leaves alone what is there already.

    Before each timing it takes away what the step before has left. Visiting every object of the process as well takes
    some 70 ms and empties the caches, which no training loop does before each of its steps.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _has_time_left(times: list[tuple[float, float]], share: float) -> bool:
    return len(times) < 2 or sum(elapsed for elapsed, _ in times) < share


def _timed(step: Callable[[], Any], device: str) -> tuple[float, float]:
    """Milliseconds of one call: elapsed, and of the processor (of the device, where that is a GPU)."""
    gc.collect()
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        elapsed = start.elapsed_time(end)
        return elapsed, elapsed
    started, busy = time.perf_counter(), time.process_time()
    step()
    return 1e3 * (time.perf_counter() - started), 1e3 * (time.process_time() - busy)


def _summary(values: list[tuple[float, float]], unit: list[tuple[float, float]]) -> Timing:
    # A step that sat out the later rounds has fewer values than the unit.
    elapsed, processor = (
        sorted(value[kind] / one[kind] for value, one in zip(values, unit, strict=False)) for kind in (0, 1)
    )
    low, high = (elapsed[round(share * (len(elapsed) - 1))] for share in (0.2, 0.8))
    milliseconds = statistics.median(value[0] for value in values)
    return Timing(milliseconds, statistics.median(elapsed), low, high, statistics.median(processor), len(values))
