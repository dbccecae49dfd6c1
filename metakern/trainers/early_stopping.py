"""Early stopping: when to stop, and the best model until then."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class EarlyStopping:
    """Keeps the model with the lowest validation error; `over` after `patience` evaluations without improvement."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._error = float("inf")
        self._waited = 0
        self._best: dict[str, torch.Tensor] = {}
        self.best_step = 0

    def add(self, step: int, error: float, model: nn.Module) -> None:
        """Record one evaluation."""
        self._waited += 1
        if error < self._error:
            self._error, self._waited, self.best_step = error, 0, step
            self._best = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @property
    def over(self) -> bool:
        return self._waited >= self._patience

    def restore(self, model: nn.Module) -> None:
        """Give `model` the values it had at `best_step`."""
        model.load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        return {"error": self._error, "waited": self._waited, "best": self._best, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._error, self._waited = state["error"], state["waited"]
        self._best, self.best_step = state["best"], state["best_step"]
