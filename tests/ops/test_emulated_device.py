"""The emulated device itself: that it finds the mistakes of a kernel, and that sources are rewritten or rejected."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from metakern.testing.inputs import normal
from tests.ops.emulated.building import CSRC
from tests.ops.emulated.device import Device
from tests.ops.emulated.rewriting import NotUnderstood, rewritten

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH, which compiles the CUDA kernels")

RACE = r"(reads|writes) shared memory at byte \d+, which another thread uses before the same barrier"
FAULTS = {
    0: r"^$",
    1: r"thread 63: reads 4 bytes at element 50 after the start of a part of x, which has 50",
    2: r"thread 63: reads 4 bytes (of no operand|at element \d+ after the start of a part of out)",
    3: r"thread 0: emulated/faults.cu:\d+:\d+: a pointer that is null or not aligned for its type",
    4: r"thread 0: reads 16 bytes at element 48 after the start of a part of x, which has 50",
    5: r"thread 0: writes to x",
    6: r"thread 0: reads element 0 of out, never written",
    7: r"thread 47: waits in __syncthreads\(\), which thread 63 never reaches",
    8: r"thread 48: waits for lanes or threads that wait elsewhere",
    9: r"thread 32: __trap\(\) was called",
    10: r"thread 0: reads shared memory at byte 0, which was not written in this block",
    11: RACE + "|which was not written in this block",
    12: r"thread 0: emulated/faults.cu:\d+:\d+: an index outside of its array",
    13: RACE,
    14: r"thread 16: a shuffle does not name the lane that calls it",
    15: r"thread 0: a shuffle reads lane 32, which it does not name",
    16: r"block 0, thread 1: writes element 0 of out, which another thread has written",
    17: r"block 1, thread 0: writes element 1 of out, which another thread has written",
    18: r"thread 0: emulated/faults.cu:\d+:\d+: a product outside of its type",
    19: r"thread 32: a shuffle names lane 16, which has left or never was",
}


@compiled
@pytest.mark.parametrize("fault", FAULTS)
def test_the_device_finds(fault: int, device: Device) -> None:
    """The mistake of each kernel in faults.cu."""
    x, out = normal(50, dtype=torch.float32), torch.zeros(2)
    device.settings()
    device.lend(x, "x")
    device.lend(out, "out", writable=True)
    try:
        found = device.fault(fault, x, out, blocks=2, threads=64)
    finally:
        device.take_back()
    assert re.search(FAULTS[fault], found), found


@compiled
def test_the_device_finds_too_many_threads(device: Device) -> None:
    found = device.fault(0, torch.ones(1), torch.ones(1), blocks=1, threads=96)
    assert found == "block 0, thread 0: 96 threads, of which __launch_bounds__ allows 64"
    assert device.fault(0, torch.ones(1), torch.ones(1), blocks=1, threads=1025) == "invalid configuration argument"
    assert device.fault(0, torch.ones(1), torch.ones(1), blocks=0, threads=64) == "invalid configuration argument"


LAUNCH = "__global__ void kernel(int x) { f(x); }\nvoid start(cudaStream_t stream) { kernel%s; }\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LAUNCH % "<<<1, 32, 0, stream>>>(3)", None),
        (LAUNCH % "<<<1, 32>>>(3)", "some.cu:2: a launch has grid, block, shared memory and stream"),
        (LAUNCH % "<<<1, 32, 0, stream>>>", "some.cu:2: a launch has grid, block, shared memory and stream"),
        ("// a kernel<<<1, 2>>>\n(&kernel)<<<1, 32, 0, stream>>>(3);", "some.cu:2: a launch is a kernel's name"),
        ("__global__ void kernel(int x);", "a kernel is defined where it is declared"),
        ("int x;\n__constant__ int y;", "some.cu:2: __constant__ has no meaning in the emulation"),
        ("void f() { extern __shared__ float parts[]; }", "some.cu:1: __shared__ has no meaning in the emulation"),
        ("void f(const int* x) {\n\n__ldg(x); }", "some.cu:3: __ldg has no meaning in the emulation"),
    ],
)
def test_what_cannot_be_rewritten_is_named(source: str, message: str | None) -> None:
    if message is None:
        assert rewritten(source, "some.cu") == (
            '#line 1 "some.cu"\n__global__ void kernel(int x) { emulated::enter(1024); f(x); }\n'
            "void start(cudaStream_t stream) { emulated::launch(1, 32, 0, stream, [=](auto... given) "
            "{ kernel(given...); })(3); }\n"
        )
    else:
        with pytest.raises(NotUnderstood, match=re.escape(message)):
            rewritten(source, "some.cu")


def test_rewriting_keeps_the_lines() -> None:
    for path in CSRC.glob("cuda/*"):
        text = path.read_text()
        assert rewritten(text, path.name).count("\n") == text.count("\n") + 1
