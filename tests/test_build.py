"""The native build: its switches, its failures, and the module it makes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from metakern.ops import extension

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt", "csrc", "LICENSE", "README.md", "metakern")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that a build here cannot touch the working tree."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif source.exists():
            shutil.copy(source, tmp_path / name)
    return tmp_path


def build(checkout: Path, **switches: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext --inplace` with the given switches; output and errors together."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, **switches}
    return subprocess.run(
        command, cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )


def wheel(checkout: Path, **switches: str) -> list[str]:
    """The files in a wheel built with the given switches."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=checkout, env={**os.environ, **switches}, check=True)
    (path,) = (checkout / "out").glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_a_source_distribution_holds_what_the_build_reads(checkout: Path) -> None:
    """All of csrc/, with its headers; what is not needed there stays out."""
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", "out"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (path,) = (checkout / "out").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    native = {str(path.relative_to(checkout)) for path in (checkout / "csrc").rglob("*.*")}
    assert len(native) > 10
    assert native | {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= found
    assert {"metakern/ops/tiles.json", "metakern/trainers/step_costs.csv", "metakern/py.typed"} <= found


def modules(checkout: Path) -> list[Path]:
    return list((checkout / "metakern").glob("_C*.so"))


@pytest.mark.slow
def test_cpu_build_names_what_it_built(checkout: Path) -> None:
    result = build(checkout, METAKERN_BUILD="cpu", MAX_JOBS="1")
    assert result.returncode == 0, result.stdout
    assert "for CPU\n" in result.stdout
    assert len(modules(checkout)) == 1


def test_unknown_mode_is_refused(checkout: Path) -> None:
    result = build(checkout, METAKERN_BUILD="gpu")
    assert result.returncode != 0
    assert "METAKERN_BUILD must be one of auto, cpu, cuda, none; got 'gpu'" in result.stdout


@pytest.mark.parametrize(
    ("variable", "values", "wanted"),
    [
        ("METAKERN_CUDA_ARCHS", ["80,90a", "8.0", "foo", "80;", "80 90a"], "semicolons, as in '80;90;100'"),
        ("MAX_JOBS", ["abc", "0", "-1", "1.5"], "a whole number, 1 or more"),
    ],
)
def test_wrong_switches_are_named(checkout: Path, variable: str, values: list[str], wanted: str) -> None:
    for value in values:
        result = build(checkout, METAKERN_BUILD="cpu", **{variable: value})
        assert result.returncode != 0
        (said,) = [line for line in result.stdout.splitlines() if line.startswith("metakern: ")]
        assert said.startswith(f"metakern: {variable} must be ")
        assert wanted in said
        assert said.endswith(f"; got {value!r}")
        assert "Traceback" not in result.stdout


@pytest.mark.slow
def test_compile_error_fails_the_build(checkout: Path) -> None:
    (checkout / "csrc" / "module.cpp").write_text("#error broken on purpose\n")
    result = build(checkout, METAKERN_BUILD="cpu")
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout
    assert modules(checkout) == []


def without_nvcc(tmp_path: Path) -> dict[str, str]:
    """Switches under which no nvcc can be found: a PATH of links to the tools that are needed."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cmake", "ninja", "c++", "g++", "gcc", "cc", "ld", "as", "ar", "ranlib", "uname", "sh"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    return {"PATH": str(tools), "CUDA_HOME": str(tools)}


@pytest.mark.slow
def test_missing_nvcc_is_said_in_one_line(checkout: Path) -> None:
    """Of a build by the defaults, which empty switches have; CMake's cache has the architectures that it was given."""
    switches = {"METAKERN_BUILD": "", "METAKERN_CUDA_ARCHS": "", "MAX_JOBS": ""}
    result = build(checkout, **switches, **without_nvcc(checkout))
    assert result.returncode == 0, result.stdout
    (cache,) = checkout.glob("build/cmake-*/CMakeCache.txt")
    assert re.search(r"^METAKERN_CUDA_ARCHS:STRING=80;90;100$", cache.read_text(), re.MULTILINE)
    assert result.stdout.count("no nvcc found: building the CPU kernels only") == 1
    refused = build(checkout, METAKERN_BUILD="cuda", PATH=str(checkout / "tools"), CUDA_HOME=str(checkout))
    assert refused.returncode != 0
    assert "METAKERN_BUILD=cuda, but no nvcc" in refused.stdout


@pytest.mark.parametrize(
    ("listed", "asked", "wanted"),
    [
        ("sm_75 sm_80 sm_90", "", "80;90"),
        ("sm_80 sm_90 sm_100 sm_120", "", "80;90;100"),
        ("sm_80 sm_90", "90a;100", "90a;100"),
        ("sm_50 sm_60", "", "80;90;100"),
    ],
)
def test_an_older_nvcc_builds_the_architectures_it_knows(checkout: Path, listed: str, asked: str, wanted: str) -> None:
    """Of the default ones: those asked for are obeyed as given. The compiler here lists them and does no more."""
    nvcc = checkout / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo {listed.replace(" ", "; echo ")}\n')
    nvcc.chmod(0o755)
    switches = {"METAKERN_BUILD": "auto", "METAKERN_CUDA_ARCHS": asked, "MAX_JOBS": "1"}
    result = build(checkout, **switches, PATH=f"{nvcc.parent}:{os.environ['PATH']}")
    (cache,) = checkout.glob("build/cmake-*/CMakeCache.txt")
    assert f"METAKERN_CUDA_ARCHS:STRING={wanted}\n" in cache.read_text()
    said = "this nvcc does not know the architectures 100: building for 80, 90\n"
    assert result.stdout.count(said) == (wanted == "80;90")


def test_none_is_a_pure_python_wheel(checkout: Path) -> None:
    files = wheel(checkout, METAKERN_BUILD="none")
    assert "metakern/ops/select.py" in files
    assert not [name for name in files if name.endswith(".so")]


def test_without_the_module_the_operators_say_so_and_run() -> None:
    program = """
import sys, torch
sys.modules["metakern._C"] = None
from metakern import ops
from metakern.ops.select import OPERATORS
for name, operator in OPERATORS.items():
    arguments = operator.contract.example(torch.device("cpu"))
    operator(*arguments)
print(OPERATORS["clip_normalise"].reasons(torch.ones(2))["native"])
"""
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert "install with METAKERN_BUILD=auto" in output


@pytest.mark.skipif(extension.missing is not None, reason=str(extension.missing))
def test_one_openmp_runtime_and_no_driver_needed() -> None:
    from metakern import _C

    needed = subprocess.check_output(["readelf", "-d", _C.__file__], text=True)
    assert "gomp" not in needed
    assert "libcuda" not in needed
    assert "torch" not in needed


@needs_nvcc
@pytest.mark.skipif(extension.cuda is None, reason="the extension was built without CUDA")
def test_kernels_for_wide_rows_read_sixteen_bytes_at_once() -> None:
    """Every kernel that takes elements by packs, by their number in its name: the compiler must not take them apart."""
    triton = pytest.importorskip("triton", reason="triton is not installed, which has a disassembler")
    from metakern import _C

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code = subprocess.check_output([disassembler, "-sass", "-arch", "sm_90a", _C.__file__], text=True)
    seen = set()
    for function in code.split("Function : ")[1:]:
        kernel = re.search(r"\d([a-z_]+_kernel)I(?:d|f|13__nv_bfloat16|6__half)Li(\d+)E", function.split("\n", 1)[0])
        if kernel is not None and int(kernel[2]) > 1:
            seen.add(kernel[1])
            assert re.search(r"LDG\.E(\.\w+)*\.128", function), kernel[0]
    rows = {"row_dots_kernel", "cross_entropy_kernel", "cross_entropy_backward_kernel"}
    assert seen == rows | {"affine_grads_kernel", "embedding_dots_kernel"}


@needs_nvcc
@pytest.mark.slow
def test_cuda_sources_compile_without_spills_for_every_architecture(checkout: Path) -> None:
    result = build(checkout, METAKERN_BUILD="cuda")
    assert result.returncode == 0, result.stdout
    assert "for CPU and CUDA" in result.stdout
    compiled = set(re.findall(r"for '(sm_\w+)'", result.stdout))
    assert compiled == {"sm_80", "sm_90", "sm_100"}
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stdout)
    assert frames
    assert {spilled for frame in frames for spilled in frame} == {"0"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_cpu_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "sanitized"
    sources = [*(ROOT / "csrc" / "cpu").glob("*.cpp"), ROOT / "tests" / "ops" / "sanitized.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", program], check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    assert subprocess.check_output([program], env=environment, text=True) == "clean\n"
