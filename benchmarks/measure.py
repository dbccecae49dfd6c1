"""Time, floating point operations and peak memory of steps, interleaved in one run."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


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


class LiveStorage(TorchDispatchMode):
    """Adds up the storages that operators return while anybody holds them; scratch inside a kernel is not seen.

    A sum of gradients that autograd makes out of place since somebody watches counts as what it is otherwise: into the
    first of them, where nobody else holds it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        # Held although only looked up: a reference that dies gives its number to another storage.
        self._known: dict[int, StorageWeakRef] = {}
        self._summed: tuple[StorageWeakRef, int] | None = None  # a gradient that was added to, and what that took

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._settle()
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf, new=False)
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf, new=True)
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        held = sum(size for _, size in self._live.values())
        if _may_add_in_place(func, args):
            self._summed = StorageWeakRef(args[0].untyped_storage()), held
        else:
            self.peak = max(self.peak, held)
        return output

    def _settle(self) -> None:
        """Whether the gradient that was added to in the call before is gone shows only now."""
        if self._summed is not None:
            first, held = self._summed
            self.peak = max(self.peak, 0 if first.expired() else held)
            self._summed = None

    def __exit__(self, *error: Any) -> None:
        self._settle()
        super().__exit__(*error)

    def _meet(self, tensor: torch.Tensor, new: bool) -> None:
        """A storage first seen as an argument was there before the step; first seen as a result, it is new.

        The zeros of forward mode, and what shapes alone are worked out by, take no memory.
        """
        if tensor.is_meta or tensor._is_zerotensor():
            return
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if new and reference.cdata not in self._known:
            self._live.setdefault(reference.cdata, (reference, storage.nbytes()))
        elif not new and reference.cdata not in self._live:
            self._known.setdefault(reference.cdata, reference)


def _may_add_in_place(func: Any, args: Any) -> bool:
    """Whether autograd, in a backward pass, sums gradients of a tensor that was used more than once.

    A view keeps its base alive, so that nothing is added to the gradient of a linear layer's weight, which is one. The
    formulas of second derivatives have sums of their own.
    """
    node = torch._C._current_autograd_node()
    by_engine = node is not None and not torch.is_grad_enabled() and "BackwardBackward" not in node.name()
    return by_engine and func is torch.ops.aten.add.Tensor and not args[0]._is_view()
