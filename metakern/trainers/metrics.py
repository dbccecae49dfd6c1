"""metrics.csv: one row per evaluation, with averages over the steps since the previous one."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metakern.methods import Outcome
from metakern.trainers.evaluate import Errors

_AVERAGED = "loss", "weighted_loss", "meta_loss", "kept"


class MetricsFile:
    """Writes the file during a run; every row is on disk as soon as it is written.

    Columns: step; loss = mean_n l_n; weighted_loss = sum_n w_n l_n; meta_loss; kept = share of weights above 0;
    test_error, balanced_error and error_CLASS in percent; validation_error, nan without a validation set; seconds since
    the start, including evaluations; steps_per_second, without evaluations.
    """

    def __init__(self, path: Path, class_names: tuple[str, ...]) -> None:
        self._path = path
        self._columns = ["step", *_AVERAGED, "test_error", "balanced_error"]
        self._columns += [f"error_{name}" for name in class_names]
        self._columns += ["validation_error", "seconds", "steps_per_second"]
        self._last: dict[str, float] = dict.fromkeys(_AVERAGED, float("nan"))
        self._before = 0.0
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(_AVERAGED, 0.0)
        self._count = 0
        self._stepping = 0.0

    def begin(self, step: int = 0) -> None:
        """Start the file anew, or continue after `step` with the rows until then."""
        rows = [] if step == 0 else [row for row in _rows(self._path) if int(row[0]) <= step]
        self._write("w", [self._columns, *rows])
        self._began = self._resumed = time.perf_counter()

    def prepared(self) -> None:
        """The method's preparation is over: it counts in the seconds, but not in the steps per second."""
        self._resumed = time.perf_counter()

    def _write(self, mode: str, rows: Sequence[Sequence[str]]) -> None:
        with self._path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run, over all the processes that it took."""
        return self._before + time.perf_counter() - self._began

    def add(self, outcome: Outcome) -> None:
        """Add one step's outcome to the averages."""
        self._last = {
            "loss": outcome.losses.mean().item(),
            "weighted_loss": (outcome.weights * outcome.losses).sum().item(),
            "meta_loss": float("nan") if outcome.meta_loss is None else outcome.meta_loss.item(),
            "kept": (outcome.weights != 0).double().mean().item(),
        }
        for name, value in self._last.items():
            self._sums[name] += value
        self._count += 1
        now = time.perf_counter()
        self._stepping, self._resumed = self._stepping + now - self._resumed, now

    def write(self, step: int, errors: Errors, validation: float | None = None) -> dict[str, float]:
        """Write the row of `step`, start new averages, and return the row by column."""
        averages = [self._sums[name] / self._count for name in _AVERAGED]
        row = [step, *averages, errors.test, errors.balanced, *errors.by_class]
        row += [float("nan") if validation is None else validation, self.seconds, self._count / self._stepping]
        self._write("a", [[as_cell(value) for value in row]])
        self._clear()
        self._resumed = time.perf_counter()
        return dict(zip(self._columns, row, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "count": self._count, "stepping": self._stepping, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._count, self._stepping = state["sums"], state["count"], state["stepping"]
        self._before = state["seconds"]

    def brief(self) -> dict[str, str]:
        """The last step's numbers, for a progress bar."""
        return {"loss": f"{self._last['loss']:.4f}", "kept": f"{100 * self._last['kept']:.0f}%"}


def as_cell(value: float) -> str:
    """A number with six digits; whole numbers, such as steps and ids, in full."""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _rows(path: Path) -> list[list[str]]:
    """The rows below the header, without a last one that was cut off while it was written."""
    text = path.read_text(encoding="utf-8")
    return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))[1:]


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns of a metrics.csv by name; empty lists if it has no rows."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return {name: [float(row[k]) for row in rows[1:]] for k, name in enumerate(rows[0])}
