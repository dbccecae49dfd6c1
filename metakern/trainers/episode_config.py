"""The settings of a comparison of few-shot learners: every field is an option of `metakern episodes`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metakern.data.shots import SHOT_SHAPES, shots
from metakern.methods.support_balance import BALANCES
from metakern.trainers.config import option

LEARNERS = ("protonet", "maml", "maml-first-order")


@dataclass(frozen=True)
class EpisodeConfig:
    """A comparison of few-shot learners; docs/methods/few-shot.md says which defaults are those of the benchmark."""

    data: str = option("iflytek", "data set with many classes: see 'metakern list', or images:DIR, or csv:FILE")
    label: str | None = option(None, "--data csv:FILE: the column with the classes", "COLUMN")
    leave_out: str | None = option(None, "--data csv:FILE: columns to ignore", "COL,COL")
    data_dir: str | None = option(None, "folder of data sets (default: the environment variable METAKERN_DATA)", "DIR")
    model: str | None = option(None, "the network, as for 'metakern train'")
    learners: str = option(",".join(LEARNERS), "few-shot learners", "A,B")
    balances: str = option(",".join(BALANCES), "remedies for the imbalance", "A,B")
    shapes: str = option(",".join(SHOT_SHAPES), "how shots are distributed over the classes of a test episode", "A,B")
    train_shape: str = option("random", "the same for training and validation episodes", "SHAPE")
    way: int = option(5, "classes per episode")
    fewest: int = option(1, "support examples of the smallest class")
    most: int = option(9, "support examples of the largest class")
    minority: float = option(0.2, "shape step: share of the classes that have the fewest", "SHARE")
    exponent: float = option(3.0, "shape long-tail: power of the curve")
    queries: int = option(15, "query examples of each class")
    held_out: float = option(0.2, "share of the classes for validation, and again for testing", "SHARE")
    train_episodes: int = option(2000, "episodes to train on")
    validations: int = option(5, "number of validations during training; the best parameters are kept")
    validation_episodes: int = option(100, "episodes per validation")
    test_episodes: int = option(600, "episodes of each shape to test on")
    lr: float = option(1e-3, "learning rate of Adam, divided by 10 in the second half", "RATE")
    inner_lr: float = option(0.1, "maml: learning rate of the steps on the support set", "RATE")
    inner_steps: int = option(10, "maml: number of steps on the support set")
    episodes_per_step: int = option(4, "maml: episodes per step of Adam; protonet takes one")
    seed: int = option(0, "determines the classes held out, the episodes and the initial parameters")
    device: str = option("cpu", "where to train: cpu, cuda, cuda:1, ...", "DEVICE")
    threads: int = option(2, "CPU threads")

    def __post_init__(self) -> None:
        for name in ("queries", "train_episodes", "validations", "validation_episodes", "episodes_per_step", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.test_episodes < 2:
            raise ValueError(f"--test-episodes must be at least 2 for an interval, got {self.test_episodes}")
        if self.inner_steps < 0:
            raise ValueError(f"--inner-steps must be at least 0, got {self.inner_steps}")
        for name in ("lr", "inner_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        for name, known in (("learners", LEARNERS), ("balances", BALANCES), ("shapes", SHOT_SHAPES)):
            chosen = self.words(name)
            if not chosen or set(chosen) - set(known):
                raise ValueError(f"--{name} takes some of {', '.join(known)}, got {getattr(self, name)!r}")
        for shape in (self.train_shape, *self.words("shapes")):
            self.shots(shape, torch.Generator())

    def words(self, name: str) -> list[str]:
        """The field called `name`, a list with commas, as words."""
        return [word.strip() for word in getattr(self, name).split(",") if word.strip()]

    def shots(self, shape: str, generator: torch.Generator) -> Tensor:
        """Support examples of each class of an episode, [way] int64."""
        return shots(
            shape,
            self.way,
            generator,
            fewest=self.fewest,
            most=self.most,
            minority=self.minority,
            exponent=self.exponent,
        )
