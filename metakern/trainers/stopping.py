"""Stopping a run from outside: at the end of a step, with a checkpoint from which it can resume."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

Stop = Callable[[], bool]  # asked after every step: shall the run stop here?
_SAID = b"\nmetakern: stopping after this step; the same signal again stops at once\n"


class Stopped(Exception):
    """The run stopped on request, after writing a checkpoint."""


def never() -> bool:
    """A `Stop` that never asks a run to stop."""
    return False


class StopSignals:
    """SIGINT and SIGTERM as a `Stop`, inside a `with` block of the main thread; in other threads nothing changes.

    The first signal is recorded. Another one at least a second later ends the process as usual; one that comes sooner
    is taken for the same signal, which `timeout` and some schedulers send to both the process and its group. Signals
    that the process ignores, as in background jobs of a script, stay ignored.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._before: dict[int, Any] = {}
        self._number: int | None = None
        self._noted = 0.0

    def __call__(self) -> bool:
        return self._number is not None

    @property
    def status(self) -> int:
        """The exit status that shells give to a process ended by the recorded signal; 0 if there was none."""
        return 0 if self._number is None else 128 + self._number

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._number is None:
            self._number, self._noted = number, time.monotonic()
            if not self._quiet:
                os.write(2, _SAID)  # not print: the signal may have come in the middle of one
        elif time.monotonic() - self._noted >= 1:
            self.__exit__()
            signal.raise_signal(number)
