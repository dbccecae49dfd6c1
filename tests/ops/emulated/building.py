"""The CUDA sources as a Python module for the CPU: rewritten, compiled beside the emulated device, and linked."""

from __future__ import annotations

import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from tests.ops.emulated.rewriting import rewritten

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"

CHECKS = "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero".split()
CHECKS.append("-fno-sanitize-recover=all")
"""Every access to memory and every operation that may be undefined calls a function, which is memory.cpp's."""


def build(folder: Path, checks: list[str] = CHECKS) -> Path:
    """The module `_C` with CUDA, in a folder of its own."""
    compiled = folder / "cuda"
    compiled.mkdir(exist_ok=True)
    for path in [*CSRC.glob("cuda/*"), HERE / "faults.cu"]:
        (compiled / path.name).write_text(rewritten(path.read_text(), f"{path.parent.name}/{path.name}"))
    headers = [f"-I{folder}", f"-I{HERE / 'include'}"]
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    flags = {path: [*checks, *headers] for path in sorted(compiled.glob("*.cu"))}
    flags |= {HERE / name: [f"-I{HERE / 'include'}"] for name in ("device.cpp", "memory.cpp")}
    flags |= {path: [f"-I{CSRC}"] for path in CSRC.glob("cpu/*.cpp")}
    flags[CSRC / "module.cpp"] = ["-O0", "-DMETAKERN_CUDA", f"-I{CSRC}", *headers, *python]
    with ThreadPoolExecutor() as pool:
        slowest_first = sorted(flags.items(), key=lambda item: item[0].stat().st_size, reverse=True)
        objects = list(pool.map(lambda item: _compiled(*item, folder), slowest_first))
    module = folder / "_C.so"
    _run("-shared", *map(str, objects), "-ldl", "-o", str(module))
    return module


def _compiled(source: Path, flags: list[str], folder: Path) -> Path:
    out = folder / f"{source.parent.name}_{source.stem}.o"
    # warnings are nvcc's to give; a fortified longjmp refuses to go from one stack to another
    common = ["-std=c++17", "-O1", "-fPIC", "-w", "-U_FORTIFY_SOURCE"]
    _run(*common, *flags, "-x", "c++", "-c", str(source), "-o", str(out))
    return out


def _run(*arguments: str) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


def kernels(module: Path) -> dict[int, str]:
    """The kernels of the module by their addresses, with their template arguments."""
    listed = subprocess.check_output(["nm", "-C", "--defined-only", str(module)], text=True)
    symbols = (line.split(maxsplit=2) for line in listed.splitlines())
    return {int(place, 16): name for place, kind, name in symbols if kind in "tTwW" and "_kernel" in name}
