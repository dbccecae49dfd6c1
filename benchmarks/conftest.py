"""Options of the benchmarks, the tables at the end, and the rows that are kept."""

import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks.cases import CPU_CASES
from benchmarks.rows import Row, append
from benchmarks.ways import table

ROWS: dict[str, list[Row]] = {}
UNITS = {
    "steps": "a re-weighted step, in plain steps",
    "meta-steps": "a step of mwnet, mlc and metabalance, in plain steps",
    "ops": "an operator, in its composition of torch calls",
    "scaling": "a re-weighted step, in plain steps, as one size grows",
    "compiled": "a re-weighted step, in plain steps, compiled and not",
    "plan": "operations and peak memory, foretold and counted",
    "precision": "a re-weighted step, in plain steps, its dots rounded and not",
    "real": "a re-weighted step of a model that people train, in plain steps",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=10.0, help="time to spend on each case (default 10)")
    parser.addoption("--providers", default="", help="comma-separated: only these beside the plain step")
    parser.addoption("--no-record", action="store_true", help="do not append the rows to benchmarks/results/")


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """The figures are for two cores; METAKERN_BENCH_THREADS asks for another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("METAKERN_BENCH_THREADS", "2")))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def collected() -> dict[str, list[Row]]:
    """Rows put here, by suite, are printed and recorded at the end."""
    for suite in UNITS:
        ROWS.setdefault(suite, [])
    return ROWS


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--seconds") or 0)


@pytest.fixture
def providers(request: pytest.FixtureRequest) -> list[str] | None:
    """The ways asked for; None for all."""
    names = request.config.getoption("--providers")
    return names.split(",") if names else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for suite, rows in ROWS.items():
        if not rows:
            continue
        terminalreporter.section(f"{UNITS[suite]} (median of interleaved rounds; 20-80 % spread)")
        terminalreporter.write_line(table(rows, {case.name: case.prototype for case in CPU_CASES}))
        if not config.getoption("--no-record"):
            terminalreporter.write_line(f"rows appended to benchmarks/results/{append(rows, 'cpu', suite).name}")
