"""Options of the benchmarks, the table at the end, and the rows that are kept."""

import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks.cases import CPU_CASES
from benchmarks.compare import table
from benchmarks.rows import Row, append

ROWS: list[Row] = []


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
def collected() -> list[Row]:
    """Rows put here are printed at the end."""
    return ROWS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not ROWS:
        return
    terminalreporter.section("a re-weighted step, in plain steps (median of interleaved rounds; 20-80 % spread)")
    terminalreporter.write_line(table(ROWS, {case.name: case.prototype for case in CPU_CASES}))
    if not config.getoption("--no-record"):
        terminalreporter.write_line(f"rows appended to benchmarks/results/{append(ROWS, 'cpu', 'steps').name}")
