"""Who may import whom, and how the house is kept: the arrows of docs/architecture.md, read from the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import metakern

PACKAGE = Path(metakern.__file__).parent
ROOT = PACKAGE.parent

# One direction: a room may import from the rooms named here and from itself.
MAY_IMPORT: dict[str, set[str]] = {
    "ops": set(),
    "capture": {"ops"},
    "layers": {"capture", "ops"},
    "dots": {"capture", "layers", "ops"},
    "weights": {"ops"},
    "weighted_grad": {"capture", "layers", "ops"},
    "engines": {"capture", "layers", "dots", "weighted_grad", "ops"},
    "step": {"capture", "engines", "weights", "weighted_grad"},
    "data": set(),
    "methods": {"step", "weights", "data"},
    "trainers": {"check_target", "step", "weights", "methods", "data", "report", "testing"},
    "report": {"ops"},
    "cli": {"trainers", "methods", "data", "report", "testing"},
    "planning": {"engines", "capture", "layers", "dots"},
    "layer_table": {"step", "testing"},
    "check_target": {"check", "planning"},
    "check": {"step", "engines", "capture", "layers", "testing"},
    "testing": set(),
    "__init__": {"ops", "layers", "weights", "step", "check", "planning", "methods"},
    "__main__": {"cli"},
}

# The arithmetic and the stages need torch and nothing else; kernels reach Triton and the extension lazily.
CORE = ("capture", "layers", "dots", "weights", "weighted_grad", "engines", "step", "ops", "testing")
THIRD_PARTY = {"ops": {"torch", "triton"}}

VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "base"}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every imported module as a dotted name, and whether it is imported when the file is."""
    lazily = {
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in lazily
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            for alias in node.names:
                inner = node.module == "metakern"
                yield f"metakern.{alias.name}" if inner else str(node.module), node not in lazily


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)


def test_every_room_with_arrows_is_there() -> None:
    assert {room_of(path) for path in SOURCES} == set(MAY_IMPORT)


@every_source
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"a new room '{room}': say in MAY_IMPORT and docs/architecture.md whom it may import"
    for name, _ in imports_of(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "metakern" and len(parts) > 1 and parts[1] not in (room, "_C", "__version__"):
            assert parts[1] in MAY_IMPORT[room], f"{room} must not import {name}"


@pytest.mark.parametrize("path", [path for path in SOURCES if room_of(path) in CORE], ids=name_of)
def test_the_core_needs_only_torch(path: Path) -> None:
    room = room_of(path)
    for name, at_import in imports_of(ast.parse(path.read_text())):
        top = name.split(".")[0]
        foreign = top in ("numpy", "triton", "sklearn", "matplotlib", "tqdm", "PIL", "transformers", "pandas")
        assert not foreign or top in THIRD_PARTY.get(room, set()), f"{room} must not import {top}"
        if top == "triton":
            assert not at_import or path.name.startswith("triton"), "Triton is imported where its kernels are"


@every_source
def test_names_say_what_is_inside(path: Path) -> None:
    parts = {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts}
    assert not parts & VAGUE, "a module is named after its one subject"


@pytest.mark.parametrize("path", [path for path in SOURCES if not path.name.startswith("triton")], ids=name_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    """A kernel may be long; nothing else."""
    text = path.read_text()
    assert len(text.splitlines()) <= 300, "a file has one subject; this one has grown into two"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert _body_lines(node) <= 50, f"{node.name} does more than one thing"


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code, without signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@every_source
def test_modules_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), "a module begins with one line on what it is"


def test_public_functions_are_documented() -> None:
    """What, formula, shapes, Raises, Source: at least the first and the errors."""
    for name in ("l2rw_step", "reweight_step", "grad_dots"):
        text = getattr(metakern, name).__doc__
        assert "Raises" in text, name
        assert "Args" in text, name
        assert "[n]" in text, name


@every_source
def test_no_half_finished_work(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert not re.search(r"^\s*except\s*:", text, re.MULTILINE), "a bare except hides errors"


CORE_TESTS = [path for room in (*CORE, "ops") for path in (ROOT / "tests" / room).glob("*.py")]


@pytest.mark.parametrize("path", sorted(set(CORE_TESTS)), ids=name_of)
def test_tolerances_are_computed(path: Path) -> None:
    assert not re.search(r"allclose\(|assert_close\(", path.read_text()), "use metakern.testing.budget"


def test_native_kernels_do_not_know_torch() -> None:
    for path in [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.c*")]:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), f"{path.name} includes torch"


def test_types_are_checked_with_torch() -> None:
    """By default pyright takes the interpreter on PATH: without a torch there, all of torch is Unknown, and passes."""
    for name in ("Makefile", ".pre-commit-config.yaml"):
        lines = re.findall(r"^(?:\t|\s*entry: )\S*pyright\b.*", (ROOT / name).read_text(), re.MULTILINE)
        assert len(lines) == 1, name
        assert re.search(r"--pythonpath \S+/bin/python$|--pythonpath \$\(BIN\)/python$", lines[0]), name


def test_every_room_has_its_tests() -> None:
    """tests/ mirrors metakern/."""
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    mirrored = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert rooms - mirrored <= {"layers"}, "layers are tested through the catalogue, in tests/step"
