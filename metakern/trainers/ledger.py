"""The weights that a method gave each training example, summed over a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metakern.data import Task
from metakern.trainers.metrics import as_cell


class Ledger:
    """For each training example: how often it was in a batch, how often its weight was not 0, and its mean n * weight.

    n * weight is 1 for an average example of a batch, whatever the batch size. The first tenth of the run is left out,
    because an untrained network says nothing about the examples.
    """

    def __init__(self, task: Task, steps: int) -> None:
        n = len(task.train)
        self._task, self._from_step = task, steps // 10
        self._seen = torch.zeros(n, dtype=torch.int64)
        self._kept = torch.zeros(n, dtype=torch.int64)
        self._sum = torch.zeros(n, dtype=torch.float64)

    def add(self, step: int, rows: Tensor, weights: Tensor) -> None:
        """Record `weights`[n] of the training examples at `rows`[n]."""
        if step < self._from_step:
            return
        rows, weights = rows.cpu(), weights.detach().cpu().double()
        self._seen.index_add_(0, rows, torch.ones_like(rows))
        self._kept.index_add_(0, rows, (weights != 0).long())
        self._sum.index_add_(0, rows, weights * len(rows))

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self._seen, "kept": self._kept, "sum": self._sum}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._seen, self._kept, self._sum = state["seen"], state["kept"], state["sum"]

    def columns(self) -> dict[str, np.ndarray]:
        """Arrays[n]: id, label, clean_label, times_seen, share_kept and mean_weight, nan if never seen."""
        seen = self._seen.double()
        return {
            "id": self._task.train.ids.numpy(),
            "label": self._task.train.targets.cpu().numpy(),
            "clean_label": self._task.clean_targets.numpy(),
            "times_seen": self._seen.numpy(),
            "share_kept": (self._kept / seen).float().numpy(),
            "mean_weight": (self._sum / seen).float().numpy(),
        }

    def save(self, folder: Path) -> None:
        """Write weights.npz and weights.csv, with the same columns."""
        columns = self.columns()
        np.savez_compressed(folder / "weights.npz", allow_pickle=False, **columns)
        lines = [",".join(columns)]
        values = [column.tolist() for column in columns.values()]
        lines += [",".join(map(as_cell, row)) for row in zip(*values, strict=True)]
        (folder / "weights.csv").write_text("\n".join(lines) + "\n")
