"""The cost of every method's step in plain steps; `python -m metakern.trainers.step_costs` measures it into a file.

Such ratios depend on machine, network and batch; the first line of the file says which they were.
"""

from __future__ import annotations

import csv
import platform
import sys
from pathlib import Path

import torch

from metakern.methods import METHODS
from metakern.trainers.config import TrainConfig
from metakern.trainers.step_time import StepTime, step_time
from metakern.trainers.task import make_task

FILE = Path(__file__).with_name("step_costs.csv")


def read_costs(path: Path = FILE) -> dict[str, float]:
    """By method, the median time of a step divided by that of a plain step; only methods that were measured."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {row["method"]: float(row["ratio"]) for row in csv.DictReader(lines)}


def measure(method: str, *, pairs: int = 25) -> StepTime | None:
    """The step of `method` on ten digits in batches of 100, or on two if it supports only two; None if neither."""
    settings = {"batch_size": 100, "steps": 40, "threads": 1}
    for data in (
        {"data": "digits", "noise": "symmetric", "noise_rate": 0.2, "imbalance": 4.0, "meta_per_class": 10},
        {"data": "digits-4v9", "majority": 0.8, "meta_per_class": 10},
    ):
        config = TrainConfig(method, **settings, **data)
        try:
            return step_time(config, METHODS[method].training_set(make_task(config), 0), pairs=pairs)
        except (ValueError, TypeError) as error:  # TypeError: a method for another kind of network
            print(f"{method} on {config.data}: {error}", file=sys.stderr)
    return None


def main() -> None:
    """Measure every method that has steps and is not in the file yet."""
    done = read_costs() if FILE.is_file() else {}
    with FILE.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not done:
            head = f"# LeNet, 28 x 28, batch 100, at most 100 meta images, {platform.machine()} CPU, 1 thread, fp32"
            print(f"{head}, torch {torch.__version__}; median, 20th and 80th percentile of 25 pairs", file=file)
            writer.writerow(["method", "ratio", "low", "high"])
        for name, method in METHODS.items():
            measured = measure(name) if method.fit is None and name not in done else None
            if measured is not None:
                writer.writerow([name, *(f"{value:.3g}" for value in measured[:3])])
                file.flush()


if __name__ == "__main__":
    main()
