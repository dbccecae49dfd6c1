"""Floating point operations and peak memory of steps."""

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from metakern.planning.live_storage import LiveStorage

T = TypeVar("T")


def count(step: Callable[[], T], device: str) -> tuple[T, int, int]:
    """What the step returns, its floating point operations, and its peak memory in bytes.

    Operations: matrix products, convolutions, attention and metakern's own operators. Peak: the largest size of all
    tensors alive at once, beyond those alive before.

    Operations and memory are counted in steps of their own, since the counter of operations puts hooks on what modules
    give back, by which graphs outlive the step's own references to them. Either step is taken twice and the second
    counts: where Python watches the operators torch makes some views by others (a reshape), so that a model is another
    one there, of which the first step has to learn what is learnt once.
    """
    _operations(step)
    operations = _operations(step)
    _peak(step, device)
    outcome, peak = _peak(step, device)
    return outcome, operations, peak


def _operations(step: Callable[[], Any]) -> int:
    gc.collect()
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def _peak(step: Callable[[], T], device: str) -> tuple[T, int]:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome = step()
        torch.cuda.synchronize()
        return outcome, torch.cuda.max_memory_allocated() - before
    with LiveStorage() as live:
        outcome = step()
    return outcome, live.peak
