"""Tasks with many classes: a clean balanced meta set is removed first, then imbalance, then label noise."""

from __future__ import annotations

import torch

from metakern.data.examples import Examples, Source, Task
from metakern.data.long_tail import SHAPES
from metakern.data.noise import noisy


def biased(
    source: Source,
    *,
    factor: float = 1.0,
    shape: str = "exponential",
    noise: str | None = None,
    rate: float = 0.0,
    size: int | None = None,
    meta_per_class: int = 10,
    whole_meta: bool = True,
    seed: int = 0,
) -> Task:
    """A meta set of `meta_per_class` clean examples of each class; the rest imbalanced by `factor`, then noisy.

    A source that has a meta set of its own keeps it, and none is removed. Classes are counted by true labels. If the
    labels of the source are themselves noisy, the meta set gets the true ones. Without `whole_meta`, for methods that
    use no meta set, classes with at most meta_per_class examples are left whole, and are missing from the meta set.
    `size` limits the training examples before the imbalance, by the same number for each class. The test set is that of
    the source.
    Raises: ValueError if a class (without `whole_meta`: every class) has no more than meta_per_class examples; for
    noise on labels that are noisy already; for hierarchical noise on a source without groups; for a shape that is not
    one of SHAPES; as those and `noise_matrix`.
    """
    classes = len(source.class_names)
    generator = torch.Generator().manual_seed(seed)
    truth = source.train.targets if source.clean_targets is None else source.clean_targets
    if noise is not None and source.clean_targets is not None:
        raise ValueError(f"biased: the labels of {source.name} are noisy already; noise must be None, got {noise!r}")
    if noise == "hierarchical" and source.groups is None:
        raise ValueError(
            f"biased: hierarchical noise stays within groups of classes, and {source.name} has none; cifar100 has, and "
            "so has --data csv:FILE with --group COLUMN"
        )
    if shape not in SHAPES:
        raise ValueError(f"biased: shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    available = torch.bincount(truth, minlength=classes)
    taken = torch.full_like(available, 0 if source.meta is not None else meta_per_class)
    if not whole_meta and bool((available > taken).any()):
        taken *= available > taken
    if meta_per_class < 1 or bool((available <= taken).any()):
        smallest = int(available.min())
        second = "a second example, which may be marked as meta (a row with split=meta, an image in a folder meta)"
        hint = "" if smallest > 1 else f"; no number will do: give that class {second}, or leave the class out"
        raise ValueError(
            f"biased: meta_per_class must be at least 1 and below the {smallest} training examples of the smallest "
            f"class, {source.class_names[int(available.argmin())]!r}, got {meta_per_class}{hint}"
        )
    counts = available - taken
    if size is not None:
        counts = counts.clamp(max=max(size // classes, 1))
    if factor != 1:
        counts = SHAPES[shape](counts, factor)
    meta, train = [], []
    for target, count in enumerate(counts.tolist()):
        rows = (truth == target).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        start = int(taken[target])
        meta.append(rows[:start])
        train.append(rows[start : start + count])
    train_rows, meta_rows = torch.cat(train), torch.cat(meta)
    chosen, held = source.train.take(train_rows), source.train.take(meta_rows)
    tail = "" if shape == "exponential" else f" ({shape})"
    name = source.name if factor == 1 else f"{source.name}, imbalance {factor:g}{tail}"
    clean_meta = Examples(held.inputs, truth[meta_rows], held.ids) if source.meta is None else source.meta
    task = Task(name, chosen, clean_meta, source.test, source.class_names, truth[train_rows], contents=source.contents)
    return task if noise is None else noisy(task, noise, rate, generator, groups=source.groups)
