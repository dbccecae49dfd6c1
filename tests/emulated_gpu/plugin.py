"""A plugin of pytest: `-p tests.emulated_gpu.plugin` runs tests of tier gpu on the emulated one.

With a PyTorch that was built with CUDA nothing is emulated.
"""

from __future__ import annotations

import ctypes
import os
import sys

import pytest

from tests.emulated_gpu.building import built_with_cuda, library

EMULATED = not built_with_cuda()


def start() -> None:
    assert "torch" not in sys.modules, "torch looks for its devices while it is imported"
    os.environ["TRITON_INTERPRET"] = "1"
    compiled = library()
    ctypes.CDLL(str(compiled), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(compiled.parent))
    from tests.emulated_gpu import kernels, runtime

    runtime.install()
    kernels.install(compiled.parent / "kernels")


def pytest_configure(config: pytest.Config) -> None:
    # NumPy's, of Triton's interpreter
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0 to a scalar")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if EMULATED:
        terminalreporter.write_line("tier gpu: on an emulated GPU", yellow=True)


if EMULATED:
    start()
