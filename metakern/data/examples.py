"""The three values that data travels in: examples, a data set as published, and what one run trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """n examples: inputs[n, ...], targets[n] int64, and ids[n] int64, the row each had in the published set.

    The ids are what makes leakage checkable: two subsets of one source share an example exactly when they share an id.
    """

    inputs: Tensor
    targets: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        lengths = (len(self.inputs), len(self.targets), len(self.ids))
        if len(set(lengths)) != 1:
            raise ValueError(f"Examples: inputs, targets and ids must be equally long, got {lengths}")

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Tensor) -> Examples:
        """The examples at `rows`[k] int64, in that order."""
        return Examples(self.inputs[rows], self.targets[rows], self.ids[rows])

    def counts(self, classes: int) -> Tensor:
        """How many examples each class has, [classes] int64."""
        return torch.bincount(self.targets, minlength=classes)


class Origin(NamedTuple):
    """Where an example of the user's own data stands: its file, and in a table its row, 1 the first below the head."""

    file: str
    row: int | None = None


@dataclass(frozen=True)
class Source:
    """A data set as it is published: its own training and test examples, before any bias is made.

    Where the published training labels are themselves noisy and the true ones are known, those are `clean_targets`[n].
    `readable[id]` is what a person reads of the training example with that id, where the inputs say nothing: its text.
    `meta` are the examples whose labels the user vouches for, apart from `train`; `origins[id]` is where each stands.
    `groups`[C] int64 is the group of each class, where the classes have some: of a fish, that it is an animal.
    `contents` is the digest of the user's own files, see `metakern.data.contents`.
    """

    name: str
    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    clean_targets: Tensor | None = None
    readable: Sequence[str] | None = None
    groups: Tensor | None = None
    meta: Examples | None = None
    origins: Sequence[Origin] | None = None
    contents: str | None = None


@dataclass(frozen=True)
class Task:
    """What one run sees: biased training examples, a small clean meta set, and the test examples.

    `train` and `meta` never share an id; `clean_targets`[n] are the labels of `train` from before any noise, and
    `corruption`[C, C] the probability that it gave true class k the label j; None where no noise was made; `contents`
    is that of the source. `certain_meta` is False where `meta` is drawn from data of the user's own, for whose labels
    nobody vouches.
    """

    name: str
    train: Examples
    meta: Examples
    test: Examples
    class_names: tuple[str, ...]
    clean_targets: Tensor
    corruption: Tensor | None = None
    contents: str | None = None
    certain_meta: bool = True

    @property
    def class_shares(self) -> Tensor:
        """The share of each class in `train`, [C] float32, summing to 1."""
        counts = self.train.counts(len(self.class_names)).float()
        return counts / counts.sum()
