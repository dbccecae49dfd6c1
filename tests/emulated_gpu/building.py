"""Compiles the emulated GPU against the headers of the installed torch, once for these sources."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "emulated_gpu"
SOURCES = sorted(HERE.glob("*.cpp"))


def library() -> Path:
    """The shared library, compiled if these sources were not before. Torch is not imported for it."""
    digest = hashlib.sha256(version("torch").encode())
    for path in [*SOURCES, HERE / "host.h", Path(__file__)]:
        digest.update(path.read_bytes())
    folder = BUILT / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "emulated_gpu.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(folder, library)
    return library


def built_with_cuda() -> bool:
    return any((_torch() / "lib").glob("*torch_cuda*"))


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _build(folder: Path, library: Path) -> None:
    torch = _torch()
    headers = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    flags = ["-std=c++20", "-O0", "-fPIC", "-w", *(f"-I{path}" for path in headers)]
    objects = [folder / f"{path.stem}.o" for path in SOURCES]
    # most of the time goes into torch's headers, so they are read once
    header = folder / "host.h"
    _run(*flags, "-x", "c++-header", HERE / "host.h", "-o", f"{header}.gch")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda path, to: _run(*flags, "-include", header, "-c", path, "-o", to), SOURCES, objects))
    libraries = ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    unfinished = folder / "unfinished.so"
    _run("-shared", *objects, f"-L{torch / 'lib'}", *libraries, f"-Wl,-rpath,{torch / 'lib'}", "-o", unfinished)
    unfinished.rename(library)


def _run(*arguments: str | Path) -> None:
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[:4000])
