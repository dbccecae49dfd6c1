"""The emulated device as the tests use it: memory that is lent to it, and tensors that say they are on a GPU."""

from __future__ import annotations

import bisect
import ctypes
import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

from torch import Tensor

from tests.ops.emulated.building import kernels

STREAM = 0x5EED0


class Emulated(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]


class Device:
    """The compiled module `_C`, and what it runs on."""

    def __init__(self, module: Path) -> None:
        spec = importlib.util.spec_from_file_location("emulated._C", module)
        assert spec is not None
        assert spec.loader is not None
        self.native: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.native)
        self.kernels = kernels(module)
        self._library = ctypes.CDLL(str(module))
        self._library.emulated_notes.restype = self._library.emulated_fault.restype = ctypes.c_char_p
        self._library.emulated_lend.argtypes = [ctypes.c_char_p, *[ctypes.c_size_t] * 3, ctypes.c_bool]
        self._library.emulated_settings.argtypes = [*[ctypes.c_int] * 2, *[ctypes.c_bool] * 2, ctypes.c_size_t]
        fault = [ctypes.c_int, *[ctypes.c_size_t] * 2, *[ctypes.c_int] * 3, ctypes.c_size_t]
        self._library.emulated_fault.argtypes = fault
        self._held: list[Tensor] = []
        self.settings()

    def settings(
        self, multiprocessors: int = 132, resident: int = 2, has_image: bool = True, backwards: bool = False
    ) -> None:
        """What the runtime says of the device: whether it has machine code for it, among others; whether the last block
        and thread go first."""
        self._library.emulated_settings(multiprocessors, resident, has_image, backwards, STREAM)

    def lend(self, tensor: Tensor, name: str, writable: bool = False) -> None:
        """Kernels may read the elements of the tensor, and nothing between them."""
        self._held.append(tensor)
        whole = tensor.is_contiguous() or tensor.numel() == 0
        row = tensor.numel() if whole else tensor.shape[-1] if tensor.stride(-1) == 1 else 1
        steps = [] if whole else [*zip(tensor.shape, tensor.stride())][: tensor.dim() - (row > 1)]
        for place in itertools.product(*(range(0, max(1, size * step), max(1, step)) for size, step in steps)):
            begin = tensor.data_ptr() + sum(place) * tensor.element_size()
            self._library.emulated_lend(name.encode(), begin, tensor.element_size(), row, writable)

    def take_back(self) -> None:
        """What was lent is no longer."""
        self._library.emulated_take_back()
        self._held.clear()

    def launched(self) -> list[str]:
        """The kernels that ran since the last call."""
        places = [int(line) for line in self._library.emulated_notes().decode().split()]
        starts = sorted(self.kernels)
        return [self.kernels[starts[bisect.bisect(starts, place) - 1]] for place in places]

    def fault(self, number: int, x: Tensor, out: Tensor, blocks: int, threads: int) -> str:
        """What is found in the kernel of this fault."""
        pointers = (x.data_ptr(), out.data_ptr(), len(x))
        return self._library.emulated_fault(number, *pointers, blocks, threads, STREAM).decode()
