"""A test set out of data that come without one."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified(targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and to test on: a fifth of each class is the test set, the same in every run.

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


def standardised(values: Tensor, train: Tensor) -> Tensor:
    """values[n, d] with mean 0 and deviation 1 over the rows `train`; a missing value (nan) becomes the mean, 0."""
    known = values[train]
    mean = known.nanmean(0)
    deviation = (known - mean).square().nanmean(0).mul(len(train) / max(len(train) - 1, 1)).sqrt()
    return ((values - mean) / deviation.clamp(min=1e-6)).nan_to_num(0)
