"""Why an engine cannot serve a model: raised by capture, acted on by the choice of engine."""

from __future__ import annotations


class EngineUnavailable(NotImplementedError):
    """This engine would not be exact here; the message says why and what to do."""
