"""metrics.csv: one row at every evaluation, averages over the steps since the row before."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from types import TracebackType

from metakern.methods import Outcome
from metakern.trainers.evaluate import Errors


class MetricsFile:
    """Writes the file while a run goes on; every row is on disk as soon as it is written.

    Columns: step; loss = mean_n l_n; weighted_loss = sum_n w_n l_n; meta_loss; kept = share of weights above 0;
    test_error, balanced_error and error_CLASS in percent; seconds since the start, evaluations included;
    steps_per_second without them.
    """

    def __init__(self, path: Path, class_names: tuple[str, ...]) -> None:
        self._path = path
        self._columns = ["step", "loss", "weighted_loss", "meta_loss", "kept", "test_error", "balanced_error"]
        self._columns += [f"error_{name}" for name in class_names] + ["seconds", "steps_per_second"]
        self._last = {"loss": float("nan"), "kept": float("nan")}
        self._clear()

    def _clear(self) -> None:
        self._sums = {"loss": 0.0, "weighted_loss": 0.0, "meta_loss": 0.0, "kept": 0.0}
        self._count = 0

    def __enter__(self) -> MetricsFile:
        self._file = self._path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(self._columns)
        self._began = self._resumed = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, outcome: Outcome) -> None:
        """Take one step's outcome into the averages."""
        self._last = {
            "loss": outcome.losses.mean().item(),
            "weighted_loss": (outcome.weights * outcome.losses).sum().item(),
            "meta_loss": float("nan") if outcome.meta_loss is None else outcome.meta_loss.item(),
            "kept": (outcome.weights != 0).double().mean().item(),
        }
        for name, value in self._last.items():
            self._sums[name] += value
        self._count += 1
        self._stepped = time.perf_counter()

    def write(self, step: int, errors: Errors) -> None:
        """Write the row of `step` and begin new averages."""
        speed = self._count / (self._stepped - self._resumed)
        averages = [self._sums[name] / self._count for name in ("loss", "weighted_loss", "meta_loss", "kept")]
        seconds = time.perf_counter() - self._began
        row = [step, *averages, errors.test, errors.balanced, *errors.by_class, seconds, speed]
        self._writer.writerow([f"{value:.6g}" for value in row])
        self._file.flush()
        self._clear()
        self._resumed = time.perf_counter()

    def brief(self) -> dict[str, str]:
        """The last step's figures, for a progress bar."""
        return {"loss": f"{self._last['loss']:.4f}", "kept": f"{100 * self._last['kept']:.0f}%"}


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns of a metrics.csv by name; an empty list for each when it has no rows."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    return {name: [float(row[k]) for row in rows[1:]] for k, name in enumerate(rows[0])}
