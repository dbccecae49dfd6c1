"""CIFAR-10, from the published batches, binary or pickled, or from an archive of JPEGs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from metakern.data.examples import Examples, Source
from metakern.data.folder import find_file
from metakern.data.pickled import read_pickled

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32
_MEAN, _DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def _from_binary(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    records = np.concatenate([np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, _RECORD) for path in paths])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _from_pickles(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for path in paths:
        batch = read_pickled(path)
        if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
            raise ValueError(f"{path} must hold a dict with data and labels, as the published batches do")
        images.append(batch[b"data"].reshape(-1, 3, 32, 32))
        labels.append(np.asarray(batch[b"labels"], np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def _from_jpeg(path: Path, test: bool) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    with np.load(path, allow_pickle=False) as stored:
        header, body, offsets = stored["header"].tobytes(), stored["body"].tobytes(), stored["offsets"]
        rows = np.flatnonzero(stored["is_test"] == test)
        labels = stored["label"][rows]
    images = np.empty((len(rows), 3, 32, 32), np.uint8)
    for k, row in enumerate(rows):
        picture = Image.open(io.BytesIO(header + body[offsets[row] : offsets[row + 1]]))
        images[k] = np.asarray(picture).transpose(2, 0, 1)
    return images, labels


def normalised_images(
    images: np.ndarray, labels: np.ndarray, mean: tuple[float, ...], deviation: tuple[float, ...]
) -> Examples:
    """images[n, 3, h, w] uint8 -> float32: pixels in 0..1, minus `mean`, divided by `deviation`, per channel."""
    inputs = torch.from_numpy(images.copy()).float().div_(255)
    inputs.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(deviation).view(3, 1, 1))
    return Examples(inputs, torch.from_numpy(labels.astype(np.int64)), torch.arange(len(labels)))


def cifar10(root: Path | None) -> Source:
    """Images [n, 3, 32, 32] float32, normalised by the usual channel means and deviations.

    Reads the published `data_batch_1.bin` .. `test_batch.bin`, or `data_batch_1` .. `test_batch` of the Python version,
    or else `cifar10_jpeg.npz`, whose images have been JPEG-compressed: accuracies may differ a little from published
    ones.
    Raises: DataNotFound if none of them exists, ValueError for pickles that hold anything else.
    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    path = find_file(
        root,
        (
            *(f"{around}cifar-10-batches-{form}" for form in ("bin", "py") for around in ("", "cifar10/")),
            "cifar10",
            ".",
        ),
        ("data_batch_1.bin", "data_batch_1", "cifar10_jpeg.npz"),
        data="CIFAR-10",
        form="the binary version, data_batch_1.bin to data_batch_5.bin and test_batch.bin, or the Python version",
        published="https://www.cs.toronto.edu/~kriz/cifar.html",
    )
    if path.suffix == ".npz":
        train, test = _from_jpeg(path, test=False), _from_jpeg(path, test=True)
    else:
        read = _from_binary if path.suffix == ".bin" else _from_pickles
        train = read([path.with_name(f"data_batch_{k}{path.suffix}") for k in range(1, 6)])
        test = read([path.with_name(f"test_batch{path.suffix}")])
    training, testing = (normalised_images(*part, _MEAN, _DEVIATION) for part in (train, test))
    return Source("cifar10", training, testing, CLASS_NAMES)
