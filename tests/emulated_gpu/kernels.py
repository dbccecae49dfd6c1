"""metakern's kernels on the emulated GPU: those in CUDA compiled for the host, those in Triton interpreted.

They are compiled without the checks of every access to memory, which tests/ops makes.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from triton.runtime import interpreter

from metakern.ops import extension
from tests.emulated_gpu import runtime
from tests.ops.emulated.building import build


class Kernels:
    """metakern._C.cuda"""

    def __init__(self, module: ModuleType) -> None:
        self._cuda = module.cuda

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._cuda, name)
        if name in ("unusable", "runtime_version"):
            return function
        return lambda *given: runtime.launch(lambda: function(*given))


def install(folder: Path) -> None:
    """Compiled into `folder`, unless they are there."""
    folder.mkdir(exist_ok=True)
    compiled = folder / "_C.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not compiled.exists():
            build(folder, checks=[])
    spec = importlib.util.spec_from_file_location("emulated._C", compiled)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = ctypes.CDLL(str(compiled)).emulated_settings
    settings.argtypes = [*[ctypes.c_int] * 2, *[ctypes.c_bool] * 2, ctypes.c_size_t]
    settings(runtime.PROPERTIES.multi_processor_count, 2, True, False, runtime.Stream.cuda_stream)
    extension.cuda = Kernels(module)
    interpreter.GridExecutor.__call__ = _interpreted(interpreter.GridExecutor.__call__)


def _interpreted(launch: Any) -> Any:
    return lambda *given, **named: runtime.launch(lambda: launch(*given, **named))
