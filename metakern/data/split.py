"""A test set for data that come without one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stratified(targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Training rows and test rows: a fifth of each class is the test set, the same in every run.

    targets[n] int64; both are int64. A class of fewer than five rows has none in the test set.
    """
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for target in range(classes):
        rows = (targets == target).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cut = len(rows) // 5
        test.append(rows[:cut])
        train.append(rows[cut:])
    return torch.cat(train), torch.cat(test)


def require_every_class(meta: Tensor, targets: Tensor, class_names: Sequence[str]) -> None:
    """Require that the meta rows `meta`[m] of targets[n] include an example of each class.

    Raises: ValueError naming the missing classes.
    """
    present = set(targets[meta].tolist())
    missing = [name for k, name in enumerate(class_names) if k not in present]
    if missing:
        raise ValueError(f"the examples marked as meta must have each class; there is none of: {', '.join(missing)}")


def require_known_classes(part: Tensor, train: Tensor, targets: Tensor, class_names: Sequence[str], what: str) -> None:
    """Require that the rows `part`[k] of targets[n], called `what`, only have classes of the rows `train`.

    Raises: ValueError naming the others.
    """
    unknown = sorted(set(targets[part].tolist()) - set(targets[train].tolist()))
    if unknown:
        named = ", ".join(repr(class_names[k]) for k in unknown)
        raise ValueError(f"{what} are of classes that no training example has: {named}")


def standardised(values: Tensor, train: Tensor) -> Tensor:
    """values[n, d] with mean 0 and deviation 1 over the rows `train`; a missing value (nan) becomes the mean, 0.

    A column that is constant over these rows has no deviation, and is only shifted.
    """
    known = values[train]
    mean = known.nanmean(0)
    deviation = (known - mean).square().nanmean(0).mul(len(train) / max(len(train) - 1, 1)).sqrt()
    rounding = 16 * torch.finfo(values.dtype).eps * mean.abs()
    return ((values - mean) / torch.where(deviation > rounding, deviation, 1)).nan_to_num(0)
