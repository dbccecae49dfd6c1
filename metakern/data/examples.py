"""The three types of data: examples, a data set as published, and what one run trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """n examples: inputs[n, ...], targets[n] int64, and ids[n] int64, their rows in the published data set.

    Ids make leakage checkable: two subsets of a source share an example exactly if they share an id.
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
        """The examples at `rows`[k] int64, in that order; a run on a GPU leaves the ids on the CPU."""
        return Examples(self.inputs[rows], self.targets[rows], self.ids[rows.to(self.ids.device)])

    def counts(self, classes: int) -> Tensor:
        """How many examples each class has, [classes] int64."""
        return torch.bincount(self.targets, minlength=classes)


class Origin(NamedTuple):
    """Where an example of the user's own data comes from: a file and, in a table, the row; the first row is 1."""

    file: str
    row: int | None = None


@dataclass(frozen=True)
class Source:
    """A data set as published: its training and test examples, before any bias is introduced.

    `clean_targets`[n] are the true labels, if the published training labels are noisy and the true ones are known.
    `readable[id]` is a readable form of the training example with that id, such as its text, if the inputs are not
    readable. `meta` are examples whose labels are certain, separate from `train`. `origins[id]` is where each example
    comes from. `groups`[C] int64 is the group of each class, if there are groups: for a fish, that it is an animal.
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
    """What one run uses: biased training examples, a small clean meta set, and the test examples.

    `train` and `meta` never share an id. `clean_targets`[n] are the labels of `train` before noise was added;
    `corruption`[C, C] holds the probabilities of label j for true class k, or is None without such noise. `contents` is
    that of the source. `certain_meta` is False if `meta` was drawn from the user's own data, whose labels nobody has
    vouched for.
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
