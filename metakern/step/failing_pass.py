"""A failure inside a model or a loss function, with a note of which batch it came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from metakern.capture.losses import evaluate_losses
from metakern.capture.refusal import EngineUnavailable


@contextmanager
def failing_pass_named() -> Iterator[None]:
    """Add a note that names the batch to any exception raised while its losses are computed. The exception's type and
    message stay as they are. Python 3.10 has no notes.
    """
    try:
        yield
    except EngineUnavailable:  # not the model's failure, but what an engine cannot do
        raise
    except Exception as error:
        argument, add_note = _failed_batch(error), getattr(error, "add_note", None)
        if argument and add_note and not str(error).startswith(argument):
            note = f"(raised while metakern computed the losses of {argument})"
            if note not in getattr(error, "__notes__", ()):
                add_note(note)
        raise


def _failed_batch(error: BaseException | None) -> str | None:
    """What errors call the batch whose losses were being computed; every pass goes through `evaluate_losses`."""
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            if frame.f_code is evaluate_losses.__code__:
                return frame.f_locals["argument"]
        error = error.__cause__
    return None
