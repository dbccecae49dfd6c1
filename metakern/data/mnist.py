"""MNIST from its four IDX files: all ten digits, or two of them as a two-class data set."""

from __future__ import annotations

from pathlib import Path

import torch

from metakern.data.examples import Examples, Source
from metakern.data.folder import find_file
from metakern.data.idx import read_idx

_FOLDERS = ("mnist", "MNIST/raw", ".")  # ours, the layout other loaders leave behind, and the folder itself
_PUBLISHED = "http://yann.lecun.com/exdb/mnist (mirror: https://ossci-datasets.s3.amazonaws.com/mnist)"


def _split(root: Path | None, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    arrays = []
    for stem, form in (
        (f"{prefix}-images-idx3-ubyte", "IDX, uint8, [n, 28, 28], plain or gzip"),
        (f"{prefix}-labels-idx1-ubyte", "IDX, uint8, [n], plain or gzip"),
    ):
        path = find_file(root, _FOLDERS, (stem + ".gz", stem), data="MNIST", form=form, published=_PUBLISHED)
        arrays.append(torch.from_numpy(read_idx(path)))
    return arrays[0], arrays[1]


def _examples(root: Path | None, prefix: str, digits: tuple[int, ...]) -> Examples:
    images, labels = _split(root, prefix)
    kept = torch.isin(labels, torch.tensor(digits, dtype=labels.dtype))
    ids = kept.nonzero().squeeze(1)
    targets = torch.zeros(10, dtype=torch.int64).scatter_(0, torch.tensor(digits), torch.arange(len(digits)))
    return Examples(images[ids].float().div_(255).unsqueeze(1), targets[labels[ids].long()], ids)


def mnist(root: Path | None, digits: tuple[int, ...] = tuple(range(10))) -> Source:
    """The digits `digits` of MNIST, whose order gives the targets; images [n, 1, 28, 28] float32 in 0..1.

    Raises: DataNotFound if one of the four files is missing.
    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998.
    """
    name = "mnist" if len(digits) == 10 else "mnist-" + "v".join(map(str, digits))
    names = tuple(map(str, digits))
    return Source(name, _examples(root, "train", digits), _examples(root, "t10k", digits), names)
