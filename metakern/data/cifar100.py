"""CIFAR-100, from the published batches, binary or pickled: 100 classes in 20 groups of five."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metakern.data.cifar10 import normalised_images
from metakern.data.examples import Source
from metakern.data.folder import find_file
from metakern.data.pickled import read_pickled

_RECORD = 2 + 3 * 32 * 32
_MEAN, _DEVIATION = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def _from_binary(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """images[n, 3, 32, 32] uint8, fine labels[n], coarse labels[n].

    Raises: ValueError when the file is not made of whole records.
    """
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(raw) or len(raw) % _RECORD:
        raise ValueError(f"{path.name}: expected records of {_RECORD} bytes, got {len(raw)} bytes")
    records = raw.reshape(-1, _RECORD)
    return records[:, 2:].reshape(-1, 3, 32, 32), records[:, 1], records[:, 0]


def _from_pickle(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same, of the Python version.

    Raises: ValueError when the file is no such pickle.
    """
    batch = _dict(path, b"data", b"fine_labels", b"coarse_labels")
    fine, coarse = (np.asarray(batch[key], np.uint8) for key in (b"fine_labels", b"coarse_labels"))
    return batch[b"data"].reshape(-1, 3, 32, 32), fine, coarse


def _dict(path: Path, *keys: bytes) -> dict[bytes, Any]:
    found = read_pickled(path)
    if not isinstance(found, dict) or not found.keys() >= {*keys}:
        named = " and ".join(key.decode() for key in keys)
        raise ValueError(f"{path} must hold a dict with {named}, as the published files do")
    return found


def _groups(path: Path, fine: np.ndarray, coarse: np.ndarray, classes: int) -> Tensor:
    """The coarse label of each class, [C] int64.

    Raises: ValueError if a class has several coarse labels, or no example.
    """
    pairs = np.unique(np.stack([fine, coarse], 1), axis=0)
    if pairs[:, 0].tolist() != list(range(classes)):
        raise ValueError(f"{path.name}: each of the {classes} fine labels must come with one coarse label")
    return torch.from_numpy(pairs[:, 1].astype(np.int64))


def cifar100(root: Path | None) -> Source:
    """Images [n, 3, 32, 32] float32, normalised by the usual channel means and deviations.

    Reads the published `train.bin`, `test.bin` and `fine_label_names.txt`, or `train`, `test` and `meta` of the Python
    version. The groups of the classes are the coarse labels.
    Raises: DataNotFound if one of them is missing, ValueError if a file does not have that form.
    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """

    def file(*names: str) -> Path:
        return find_file(
            root,
            (
                *(f"{around}cifar-100-{form}" for form in ("binary", "python") for around in ("", "cifar100/")),
                "cifar100",
            ),
            names,
            data="CIFAR-100",
            form="the binary version, train.bin, test.bin and fine_label_names.txt, or the Python version, train, test "
            "and meta",
            published="https://www.cs.toronto.edu/~kriz/cifar.html",
        )

    path = file("train.bin", "train")
    if path.suffix == ".bin":
        read, names = _from_binary, file("fine_label_names.txt").read_text(encoding="utf-8").split()
    else:
        read = _from_pickle
        names = [name.decode() for name in _dict(file("meta"), b"fine_label_names")[b"fine_label_names"]]
    images, fine, coarse = read(path)
    test_images, test_fine, _ = read(file(f"test{path.suffix}"))
    training, testing = (
        normalised_images(*part, _MEAN, _DEVIATION) for part in ((images, fine), (test_images, test_fine))
    )
    return Source("cifar100", training, testing, tuple(names), groups=_groups(path, fine, coarse, len(names)))
