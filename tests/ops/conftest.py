from __future__ import annotations

import fcntl
import os
import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ops.emulated.device import Device


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Every operator test runs on poisoned memory."""


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    """The emulated device, with the module, which is compiled once for all processes of the session."""
    from tests.ops.emulated.building import build  # here: other tests of operators need no pybind11
    from tests.ops.emulated.device import Device

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    place, unfinished = folder / "emulated", folder / "unfinished"
    with open(folder / "emulated.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(place)
    return Device(place / "_C.so")
