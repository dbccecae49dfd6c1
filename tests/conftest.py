"""Tiers, and what was not covered: a skipped tier is named in the summary, so that green is not mistaken for tested."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETER_OPTION = "--interpreter"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        INTERPRETER_OPTION, action="store_true", help="run Triton kernels in its interpreter, for `-m interpreter`"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(INTERPRETER_OPTION):
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported, so before any test module
    torch.set_num_threads(1)  # the tensors are small: threads would wait for one another longer than they work


def _missing_tiers(config: pytest.Config) -> dict[str, str]:
    """Tier -> why it cannot run in this process."""
    tiers = {}
    if not torch.cuda.is_available():
        tiers["gpu"] = "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        tiers["interpreter"] = tiers["compiled"] = "triton is not installed"
    elif config.getoption(INTERPRETER_OPTION):
        tiers["compiled"] = "the interpreter's process cannot compile"
    else:
        tiers["interpreter"] = f"needs a process of its own: pytest -m interpreter {INTERPRETER_OPTION}"
    return tiers


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiers = _missing_tiers(config)
    for item in items:
        for tier, reason in tiers.items():
            if item.get_closest_marker(tier) is not None:
                item.add_marker(pytest.mark.skip(reason=f"tier {tier}: {reason}"))


def pytest_collection_finish() -> None:
    """What is there now stays: fourteen thousand tests and torch itself, which each collection would look through."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for tier, reason in _missing_tiers(config).items():
        terminalreporter.write_line(f"tier not run here: {tier} ({reason})", yellow=True)


@pytest.fixture
def exact_cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuDNN multiplies float32 as it is, where it would take TF32, and adds in a fixed order."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    kinds = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    yield
    for kind, precision in zip(kinds, before, strict=True):
        kind.fp32_precision = precision


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh buffers hold NaN, so an output element that a kernel forgets to write is seen."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # meta and fake tensors have no values; integers have no NaN
        if tensor.is_floating_point() and not tensor.is_meta and type(tensor) is torch.Tensor:
            tensor.fill_(float("nan"))
        return tensor

    return allocate_nan
