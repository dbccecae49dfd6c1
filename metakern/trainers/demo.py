"""The runs of `metakern demo`: small enough for a few minutes on two cores, hard enough to show the difference."""

from __future__ import annotations

from metakern.data import DataNotFound, load
from metakern.trainers.config import TrainConfig


def demo_config(data_dir: str | None) -> TrainConfig:
    """The plain run of the demo: MNIST 4 against 9 if it is available, else the bundled digits.

    One thread: on a busy machine, two threads that wait for each other are many times slower.
    """
    try:
        load("mnist-4v9", data_dir)
    except DataNotFound:
        return TrainConfig("uniform", data="digits-4v9", majority=0.95, steps=400, threads=1, evaluations=16)
    return TrainConfig(
        "uniform", data="mnist-4v9", data_dir=data_dir, majority=0.995, steps=600, threads=1, evaluations=12
    )
