import pytest

from metakern.trainers import TrainConfig


@pytest.fixture
def quick() -> TrainConfig:
    """A run of a second: too short to learn, long enough to leave everything a run leaves."""
    return TrainConfig("uniform", data="digits-4v9", majority=0.9, steps=6, batch_size=20, evaluations=3, threads=1)
