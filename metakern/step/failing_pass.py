"""A failure inside a model or a loss function, with a note of which batch it came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from metakern.capture.losses import evaluate_losses


@contextmanager
def failing_pass_named() -> Iterator[None]:
    """Add a note that names the batch to any exception raised while its losses are computed. The exception's type and
    message stay as they are. Python 3.10 has no notes.
    """
    try:
        yield
    except Exception as error:
        argument = _failed_batch(error)
        if argument and hasattr(error, "add_note") and not str(error).startswith(argument):
            error.add_note(f"(raised while metakern computed the losses of {argument})")
        raise


def _failed_batch(error: Exception) -> str | None:
    """What errors call the batch whose losses were being computed; every pass goes through `evaluate_losses`."""
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code is evaluate_losses.__code__:
            return frame.f_locals["argument"]
    return None
