"""Settings of torch that hold for the whole process, changed while any block that needs the change is open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ProcessWide:
    """A change that the first open block makes and the last one to end undoes; blocks of two threads may end in any
    order. `make` returns what undoes it, or None if there is nothing to change yet: then the next block asks again.
    """

    def __init__(self, make: Callable[[], Callable[[], object] | None]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._undo: Callable[[], object] | None = None
        self._blocks = 0

    @contextmanager
    def changed(self) -> Iterator[None]:
        with self._lock:
            if self._undo is None:
                self._undo = self._make()
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0 and self._undo is not None:
                    undo, self._undo = self._undo, None
                    undo()
