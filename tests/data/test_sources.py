import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from metakern.data import NAMES, DataNotFound, Source, data_dir, load


def write_mnist(folder: Path, packed: bool) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for prefix, n in (("train", 60), ("t10k", 30)):
        labels = np.arange(n) % 10
        images = rng.integers(0, 256, (n, 28, 28))
        for stem, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            raw = (
                bytes([0, 0, 8, array.ndim])
                + struct.pack(f">{array.ndim}I", *array.shape)
                + array.astype("u1").tobytes()
            )
            (folder / (stem + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)


@pytest.mark.parametrize(("folder", "packed"), [("mnist", True), ("mnist", False), ("MNIST/raw", True), (".", False)])
def test_mnist_is_found_in_every_layout(tmp_path, folder, packed):
    write_mnist(tmp_path / "root" / folder, packed)
    source = load("mnist-4v9", tmp_path / "root")
    assert source.class_names == ("4", "9")
    assert source.train.counts(2).tolist() == [6, 6]
    assert source.test.counts(2).tolist() == [3, 3]
    assert source.train.inputs.shape == (12, 1, 28, 28)
    assert source.train.inputs.dtype == torch.float32
    assert float(source.train.inputs.min()) >= 0
    assert float(source.train.inputs.max()) <= 1
    # An id is the row in the published file: there, row r had the label r % 10.
    assert (source.train.ids % 10).tolist() == [(4, 9)[target] for target in source.train.targets.tolist()]


def test_environment_names_the_folder(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist", packed=True)
    monkeypatch.setenv("METAKERN_DATA", str(tmp_path))
    assert len(load("mnist").train) == 60


def test_missing_mnist_says_what_where_and_how(tmp_path):
    with pytest.raises(DataNotFound) as caught:
        load("mnist-4v9", tmp_path)
    message = str(caught.value)
    for part in (
        "train-images-idx3-ubyte",
        "IDX",
        "yann.lecun.com",
        "METAKERN_DATA",
        "--data-dir",
        str(tmp_path),
        "digits-4v9",
    ):
        assert part in message


def test_no_folder_named(monkeypatch):
    monkeypatch.delenv("METAKERN_DATA", raising=False)
    assert data_dir() is None
    with pytest.raises(DataNotFound, match="no data folder was named"):
        load("mnist")


def test_folder_that_is_none(tmp_path):
    with pytest.raises(DataNotFound, match="not a folder"):
        load("mnist", tmp_path / "absent")


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown data set 'mnist-4v8'.*digits-4v9") as caught:
        load("mnist-4v8")
    assert all(name in str(caught.value) for name in NAMES)


def overlap(source: Source) -> set[int]:
    return set(source.train.ids.tolist()) & set(source.test.ids.tolist())


@pytest.mark.parametrize("name", ["digits-4v9", "digits"])
def test_digits_need_no_download(name, monkeypatch):
    monkeypatch.delenv("METAKERN_DATA", raising=False)
    source = load(name)
    assert source.train.inputs.shape[1:] == (1, 28, 28)
    assert float(source.train.inputs.min()) >= 0
    assert float(source.train.inputs.max()) <= 1
    assert source.test.counts(len(source.class_names)).unique().tolist() == [45]
    assert not overlap(source)
    again = load(name)
    assert torch.equal(source.test.ids, again.test.ids)


def test_digits_keep_their_picture():
    from sklearn.datasets import load_digits

    source = load("digits-4v9")
    original = torch.from_numpy(load_digits().images[int(source.train.ids[0])]).float() / 16
    shrunk = torch.nn.functional.avg_pool2d(source.train.inputs[0, :, 2:-2, 2:-2], 3)[0]
    correlation = torch.corrcoef(torch.stack([original.flatten(), shrunk.flatten()]))[0, 1]
    assert correlation > 0.95
