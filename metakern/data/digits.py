"""scikit-learn's bundled handwritten digits: real scans, available without a download."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from metakern.data.examples import Examples, Source

_TEST_PER_CLASS = 45


def _to_28(images: torch.Tensor) -> torch.Tensor:
    """[n, 8, 8] in 0..16 -> [n, 1, 28, 28] in 0..1: enlarged three times, with the border of MNIST's images."""
    larger = F.interpolate(images.unsqueeze(1) / 16, scale_factor=3, mode="bilinear", align_corners=False)
    return F.pad(larger, (2, 2, 2, 2))


def digits(classes: tuple[int, ...] = tuple(range(10))) -> Source:
    """The digits `classes`, resized to MNIST's 28 x 28, so that one network fits both data sets.

    The test set has 45 images of each class, the same in every run: about a quarter of the 180 there are.
    Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = _to_28(torch.from_numpy(images).float().view(-1, 8, 8))
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for digit in classes:
        rows = torch.from_numpy(labels == digit).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        test.append(rows[:_TEST_PER_CLASS])
        train.append(rows[_TEST_PER_CLASS:])

    def examples(parts: list[torch.Tensor]) -> Examples:
        ids = torch.cat(parts)
        targets = torch.cat([torch.full((len(part),), target) for target, part in enumerate(parts)])
        return Examples(inputs[ids], targets, ids)

    name = "digits" if len(classes) == 10 else "digits-" + "v".join(map(str, classes))
    return Source(name, examples(train), examples(test), tuple(map(str, classes)))
