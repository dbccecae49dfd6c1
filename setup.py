"""Builds `metakern._C` with CMake and ninja. Imports no torch: the extension does not depend on it.

METAKERN_BUILD=auto|cpu|cuda|none (auto: CUDA where an nvcc is found), METAKERN_CUDA_ARCHS="80;90;100" and MAX_JOBS
are the only switches. An empty one has its default; of the default architectures those are built that nvcc knows.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
ARCHITECTURES = "80;90;100"


def say(text: str) -> None:
    print(f"metakern: {text}", file=sys.stderr, flush=True)


def build_mode() -> str:
    mode = os.environ.get("METAKERN_BUILD") or "auto"
    if mode not in MODES:
        sys.exit(f"metakern: METAKERN_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    return mode


def cuda_architectures(nvcc: str | None) -> str:
    """Those asked for; without any, the default ones that this compiler knows."""
    asked = os.environ.get("METAKERN_CUDA_ARCHS")
    found = asked or ARCHITECTURES
    if not re.fullmatch(r"\d{2,3}[af]?(;\d{2,3}[af]?)*", found, re.ASCII):
        sys.exit(
            f"metakern: METAKERN_CUDA_ARCHS must be CUDA architectures, separated by semicolons, as in "
            f"{ARCHITECTURES!r}; got {found!r}"
        )
    return found if asked or nvcc is None else known_to(nvcc, found)


def known_to(nvcc: str, architectures: str) -> str:
    listed = subprocess.run([nvcc, "--list-gpu-code"], text=True, capture_output=True, check=False).stdout.split()
    known = [name for name in architectures.split(";") if f"sm_{name}" in listed]
    left_out = [name for name in architectures.split(";") if name not in known]
    if not known:  # what the compiler says of them is the better message
        return architectures
    if left_out:
        say(f"this nvcc does not know the architectures {', '.join(left_out)}: building for {', '.join(known)}")
    return ";".join(known)


def parallel_jobs() -> str:
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not re.fullmatch(r"0*[1-9]\d*", jobs, re.ASCII):
        sys.exit(f"metakern: MAX_JOBS must be a whole number, 1 or more, of parallel compilers; got {jobs!r}")
    return jobs


def find_nvcc(mode: str) -> str | None:
    """The CUDA compiler, or None for a build without it. A GPU is not asked for: images are built without one."""
    if mode == "cpu":
        return None
    toolkit = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which(os.path.join(toolkit, "bin", "nvcc"))
    if nvcc is None and mode == "cuda":
        sys.exit("metakern: METAKERN_BUILD=cuda, but no nvcc on PATH or under CUDA_HOME")
    if nvcc is None:
        say("no nvcc found: building the CPU kernels only")
    return nvcc


def find_tool(name: str) -> str:
    """A build tool beside the running interpreter, or on PATH."""
    tool = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if tool is None:
        sys.exit(f"metakern: {name} not found; `pip install {name}`, or METAKERN_BUILD=none for pure Python")
    return tool


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        sys.exit("metakern: pybind11 not found; `pip install pybind11`, or METAKERN_BUILD=none for pure Python")
    return pybind11.get_include()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        nvcc, jobs = find_nvcc(build_mode()), parallel_jobs()
        architectures = cuda_architectures(nvcc)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "METAKERN_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "METAKERN_PYBIND11_INCLUDE": pybind11_include(),
            "METAKERN_OUTPUT_DIRECTORY": target.parent,
            "METAKERN_OUTPUT_NAME": target.name,
            "METAKERN_CUDA_ARCHS": architectures,
            "METAKERN_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        cmake = find_tool("cmake")
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.check_call([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions])
        subprocess.check_call([cmake, "--build", build, "--parallel", jobs])
        say(f"built {target.name} for CPU{' and CUDA' if nvcc else ''}")


extensions = [] if build_mode() == "none" else [Extension("metakern._C", sources=[])]
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
