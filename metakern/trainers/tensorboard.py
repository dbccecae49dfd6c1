"""The rows of metrics.csv for TensorBoard, if it is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path


class Board:
    """Event files in `folder`/tensorboard.

    Raises: ValueError if the package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as missing:
            raise ValueError("--tensorboard: not installed; try: pip install tensorboard") from missing
        self._folder, self._open = str(folder / "tensorboard"), SummaryWriter

    def begin(self, after: int = 0) -> None:
        """Start, or continue after a step; TensorBoard discards later points of a run that was killed."""
        self._writer = self._open(self._folder, purge_step=after + 1)

    def add(self, row: Mapping[str, float]) -> None:
        """One point, at the "step" of `row`, on the curve of each of its columns that is a number."""
        for name, value in row.items():
            if name != "step" and not math.isnan(value):
                self._writer.add_scalar(name, value, int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
