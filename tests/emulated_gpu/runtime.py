"""torch.cuda for the emulated GPU: what PyTorch implements in its own build with CUDA only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import emulated_gpu as gpu
import torch
from torch.storage import UntypedStorage

PROPERTIES = SimpleNamespace(
    name="emulated",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=1 << 37,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    L2_cache_size=50 << 20,
)
"""Those of an H100."""


def index_of(device: Any) -> int:
    """-1 for the current device."""
    if device is None or isinstance(device, int):
        return -1 if device is None else device
    index = torch.device(device).index
    return -1 if index is None else index


def known_index(device: Any) -> int:
    index = index_of(device)
    return gpu.current_device() if index < 0 else index


class Stream:
    """torch.cuda.Stream: work is done when it is asked for, in whatever stream."""

    cuda_stream = 0x5EED0
    _last = 0

    def __init__(self, device: Any = None, number: int | None = None) -> None:
        Stream._last += 1
        self.device = torch.device("cuda", known_index(device))
        self.number = Stream._last if number is None else number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self.device, self.number) == (other.device, other.number)

    def __hash__(self) -> int:
        return hash((self.device, self.number))

    def wait_stream(self, stream: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        gpu.wait("a stream's synchronize()")


class Event:
    """torch.cuda.Event"""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        gpu.wait("an event's synchronize()")

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class CUDAGraph:
    """torch.cuda.CUDAGraph"""

    captured: Any = None

    def replay(self) -> None:
        self.captured.replay()

    def pool(self) -> int:
        return id(self)

    def reset(self) -> None:
        self.captured = None


_streams: dict[int, Stream] = {}
_sync_debug_mode = 0


def exchange_device(index: int) -> int:
    before = gpu.current_device()
    gpu.set_device(index)
    return before


def current_stream(device: Any = None) -> Stream:
    index = known_index(device)
    return _streams.setdefault(index, Stream(index, number=0))


@contextlib.contextmanager
def stream(given: Stream) -> Iterator[None]:
    with torch.cuda.device(given.device):
        before = current_stream()
        _streams[given.device.index] = given
        try:
            yield
        finally:
            _streams[given.device.index] = before


@contextlib.contextmanager
def graph(cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
    gpu.begin_capture()
    gpu.set_sync_debug_mode(2)
    try:
        yield
    finally:
        cuda_graph.captured = gpu.end_capture()
        _obey_sync_debug_mode()


def set_sync_debug_mode(mode: int | str) -> None:
    global _sync_debug_mode
    _sync_debug_mode = {"default": 0, "warn": 1, "error": 2}[mode] if isinstance(mode, str) else mode
    _obey_sync_debug_mode()


def _obey_sync_debug_mode() -> None:
    gpu.set_sync_debug_mode(2 if gpu.capturing() else _sync_debug_mode)


def set_rng_state_all(states: list[torch.Tensor]) -> None:
    for k, state in enumerate(states):
        gpu.generator(k).set_state(state)


def manual_seed_all(seed: int) -> None:
    for k in range(gpu.devices):
        gpu.generator(k).manual_seed(seed)


def launch(call: Callable[[], Any]) -> Any:
    """A kernel that is not torch's: it does not wait, and takes part in captures."""
    results = []

    def freely() -> None:
        gpu.set_sync_debug_mode(0)
        try:
            results[:] = [call()]
        finally:
            _obey_sync_debug_mode()

    gpu.launch(freely)
    return results[0]


def cloned_storage(storage: UntypedStorage) -> UntypedStorage:
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return whole.clone().untyped_storage()


def install() -> None:
    """Replaces the functions of torch.cuda."""
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda._initialized, cuda._is_in_bad_fork = True, lambda: False
    cuda.is_initialized = cuda.is_available = lambda: True
    cuda.device_count = lambda: gpu.devices
    cuda.current_device = gpu.current_device
    cuda.set_device = lambda device: gpu.set_device(index_of(device))
    cuda._exchange_device = cuda._maybe_exchange_device = exchange_device
    cuda.Stream, cuda.Event, cuda.CUDAGraph = Stream, Event, CUDAGraph
    cuda.stream, cuda.current_stream, cuda.graph = stream, current_stream, graph
    cuda.get_device_properties = lambda device=None: PROPERTIES
    cuda.get_device_name = lambda device=None: PROPERTIES.name
    cuda.get_device_capability = lambda device=None: (PROPERTIES.major, PROPERTIES.minor)
    cuda.synchronize = lambda device=None: gpu.wait("torch.cuda.synchronize()")
    cuda.set_sync_debug_mode, cuda.get_sync_debug_mode = set_sync_debug_mode, lambda: _sync_debug_mode
    cuda.is_current_stream_capturing = gpu.capturing
    cuda.get_rng_state = lambda device="cuda": gpu.generator(index_of(device)).get_state()
    cuda.set_rng_state = lambda state, device="cuda": gpu.generator(index_of(device)).set_state(state)
    cuda.get_rng_state_all = lambda: [gpu.generator(k).get_state() for k in range(gpu.devices)]
    cuda.set_rng_state_all, cuda.manual_seed_all = set_rng_state_all, manual_seed_all
    cuda.manual_seed = lambda seed: gpu.generator(-1).manual_seed(seed)
    cuda.default_generators = tuple(gpu.generator(k) for k in range(gpu.devices))
    cuda.empty_cache = lambda: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda device=None: 0
    cuda.reset_peak_memory_stats = lambda device=None: None
    torch._C._has_cudnn = True
    torch.backends.cudnn.rnn.get_cudnn_mode = ["RNN_RELU", "RNN_TANH", "LSTM", "GRU"].index
    torch.backends.cudnn.is_acceptable.__globals__["_init"] = lambda: True  # of the module behind torch.backends.cudnn
    UntypedStorage.clone = cloned_storage  # type: ignore[method-assign]
