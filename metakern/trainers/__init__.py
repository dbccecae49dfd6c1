"""Reference trainers: one loop for every method, comparisons over a grid, and reports.

run = train(TrainConfig("l2rw", data="digits-4v9", majority=0.9), Path("runs/first"))
run.errors.test                                  # percent
"""

from metakern.trainers.config import TrainConfig
from metakern.trainers.loop import Run, train

__all__ = ["Run", "TrainConfig", "train"]
