"""Few-shot episodes: classes split into training, validation and test classes, and small tasks drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metakern.data.examples import Examples, Source
from metakern.data.nodes import GraphSource


@dataclass(frozen=True)
class Pool:
    """The examples of some classes: `rows[k]` are those of class `classes[k]`, a class number of the source."""

    examples: Examples
    rows: tuple[Tensor, ...]
    classes: tuple[int, ...]


class ClassSplit(NamedTuple):
    """Three pools that share neither a class nor an example."""

    train: Pool
    validation: Pool
    test: Pool


class Episode(NamedTuple):
    """A small task: its targets 0 .. K-1 stand for `classes[K]`, class numbers of the source."""

    support: Examples
    query: Examples
    classes: Tensor


def split_classes(source: Source, *, smallest: int, held_out: float = 0.2, seed: int = 0) -> ClassSplit:
    """Pools of training, validation and test classes; each class has at least `smallest` examples.

    Validation and test get a share `held_out` of the classes each, drawn by `seed`, with all their examples. Training
    classes only have the examples of the source's training set, so that no published test example is trained on. In the
    pools, the ids of test examples continue those of training examples.
    Raises: ValueError for a graph, and if held_out is not in (0, 0.5) or leaves one of the three without a class.
    """
    if isinstance(source, GraphSource):
        raise ValueError(f"episodes: {source.name} is a graph, whose nodes cannot be drawn apart from each other")
    if not 0 < held_out < 0.5:
        raise ValueError(f"episodes: held_out must be a share above 0 and below 0.5, got {held_out}")
    examples, own = _both_parts(source)
    everything = torch.ones_like(own)
    counts = examples.counts(len(source.class_names))
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    eligible = order[counts[order] >= smallest]
    held = int(held_out * len(eligible) + 1e-9)
    train = eligible[2 * held :]
    train = train[source.train.counts(len(counts))[train] >= smallest]
    if not held or not len(train):
        raise ValueError(
            f"episodes: {source.name} has {len(eligible)} classes of {smallest} or more examples, which a share of "
            f"{held_out:g} splits into {len(train)} to train on and {held} each for validation and test"
        )
    return ClassSplit(
        _pool(examples, own, train),
        _pool(examples, everything, eligible[held : 2 * held]),
        _pool(examples, everything, eligible[:held]),
    )


def _both_parts(source: Source) -> tuple[Examples, Tensor]:
    """All examples of the source, and whether each is in its training set, [n] bool."""
    train, test = source.train, source.test
    after = int(train.ids.max()) + 1
    examples = Examples(
        torch.cat([train.inputs, test.inputs]),
        torch.cat([train.targets, test.targets]),
        torch.cat([train.ids, test.ids + after]),
    )
    return examples, torch.arange(len(examples)) < len(train)


def _pool(examples: Examples, allowed: Tensor, classes: Tensor) -> Pool:
    numbers = tuple(sorted(classes.tolist()))
    rows = tuple(((examples.targets == number) & allowed).nonzero().squeeze(1) for number in numbers)
    return Pool(examples, rows, numbers)


def draw_episode(pool: Pool, shots: Tensor, queries: int, generator: torch.Generator) -> Episode:
    """An episode of K classes: shots[k] support examples of its class k, and `queries` others of each class.

    Classes and examples are drawn without replacement, so which class has how many shots is random.
    Raises: ValueError if the pool has too few classes, or a drawn class too few examples.
    """
    way = len(shots)
    if way > len(pool.classes):
        raise ValueError(f"episodes: {way} classes are needed, there are {len(pool.classes)}")
    chosen = torch.randperm(len(pool.classes), generator=generator)[:way]
    support, query = [], []
    for index, count in zip(chosen.tolist(), shots.tolist(), strict=True):
        rows = pool.rows[index]
        if len(rows) < count + queries:
            raise ValueError(
                f"episodes: class {pool.classes[index]} has {len(rows)} examples, "
                f"but {count} support and {queries} query examples are needed"
            )
        rows = rows[torch.randperm(len(rows), generator=generator)]
        support.append(rows[:count])
        query.append(rows[count : count + queries])
    return Episode(
        _relabelled(pool.examples, support),
        _relabelled(pool.examples, query),
        torch.tensor([pool.classes[index] for index in chosen.tolist()]),
    )


def _relabelled(examples: Examples, rows: Sequence[Tensor]) -> Examples:
    taken = examples.take(torch.cat(list(rows)))
    targets = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(one) for one in rows]))
    return Examples(taken.inputs, targets, taken.ids)
