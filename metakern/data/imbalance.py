"""Class imbalance by seeded sampling without replacement; the meta set shares no example with the training set."""

from __future__ import annotations

import torch

from metakern.data.examples import Source, Task
from metakern.data.noise import noisy


def _binary_counts(available: torch.Tensor, majority: float, size: int, meta_per_class: int) -> tuple[int, int]:
    """How many minority and majority examples to draw: the requested share, at the largest size possible."""
    size = min(size, int(available[1] / majority), int(available[0] / (1 - majority)))
    minority = max(size - round(size * majority), meta_per_class + 1)
    return minority, min(round(size * majority), int(available[1]))


def binary_imbalance(
    source: Source,
    *,
    majority: float = 0.995,
    noise: str | None = None,
    rate: float = 0.0,
    size: int = 5000,
    meta_per_class: int = 5,
    seed: int = 0,
) -> Task:
    """A two-class task in which class 1 has the share `majority` of `size` training examples; then label noise.

    The meta set, `meta_per_class` examples of each class, is taken from these `size` examples, so that no method sees
    more data than another; or it is the source's own. The test set is that of the source. If the source is too small,
    the size is reduced, and the minority keeps at least one training example; `Task.class_shares` has the resulting
    shares. With `noise`, the training labels are then corrupted at that `rate`, see `noise_matrix`.
    Raises: ValueError if the source does not have two classes, majority is not in [0.5, 1), or a class has too few
    examples; as `noise_matrix`.
    Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, section 4.1.
    """
    if len(source.class_names) != 2:
        raise ValueError(f"binary_imbalance: source must have 2 classes, {source.name!r} has {len(source.class_names)}")
    if not 0.5 <= majority < 1:
        raise ValueError(f"binary_imbalance: majority must be in [0.5, 1), got {majority}")
    available = source.train.counts(2)
    taken = 0 if source.meta is not None else meta_per_class
    if meta_per_class < 1 or int(available.min()) <= taken:
        raise ValueError(
            f"binary_imbalance: meta_per_class must be at least 1 and below the smaller class's "
            f"{int(available.min())} examples, got {meta_per_class}"
        )
    counts = _binary_counts(available, majority, size, taken)
    generator = torch.Generator().manual_seed(seed)
    meta, train = [], []
    for target, count in enumerate(counts):
        rows = (source.train.targets == target).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)][:count]
        meta.append(rows[:taken])
        train.append(rows[taken:])
    chosen = source.train.take(torch.cat(train))
    task = Task(
        f"{source.name} at majority {majority:g}",
        chosen,
        source.train.take(torch.cat(meta)) if source.meta is None else source.meta,
        source.test,
        source.class_names,
        chosen.targets.clone(),
        contents=source.contents,
    )
    return task if noise is None else noisy(task, noise, rate, generator)
