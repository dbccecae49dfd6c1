"""Loaders of the published formats, on files of a few rows written here."""

import gzip
import io
import json
import pickle
import struct
from collections import defaultdict
from dataclasses import fields

import numpy as np
import pytest
import torch

from metakern.data import DataNotFound, biased, load, load_graph
from metakern.data.text import characters, words


def test_cifar10_binary_batches(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        records = rng.integers(0, 256, (10, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(10)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    source = load("cifar10", tmp_path)
    assert source.train.inputs.shape == (50, 3, 32, 32)
    assert source.test.counts(10).tolist() == [1] * 10
    # The last record written is the last test image; its first byte after the label is red at the top left.
    red = (records[-1, 1] / 255 - 0.4914) / 0.2470
    assert float(source.test.inputs[-1, 0, 0, 0]) == pytest.approx(red, rel=1e-5)


class PickledByPython2(pickle._Pickler):
    """Its strings are bytes, as in the published batches."""

    def save_string(self, value: bytes | str) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def as_python_2(value: object) -> bytes:
    buffer = io.BytesIO()
    PickledByPython2(buffer, 2).dump(value)
    return buffer.getvalue().replace(b"numpy._core", b"numpy.core")


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar10"])
def test_cifar10_pickled_batches(tmp_path, folder):
    """The same numbers as the binary batches."""
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "binary").mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        records = rng.integers(0, 256, (10, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(10)
        (tmp_path / "binary" / f"{name}.bin").write_bytes(records.tobytes())
        batch = {b"batch_label": b"one", b"labels": records[:, 0].tolist(), b"data": records[:, 1:].copy()}
        (tmp_path / folder / name).write_bytes(as_python_2(batch))
    pickled, binary = load("cifar10", tmp_path), load("cifar10", tmp_path / "binary")
    for ours, theirs in ((pickled.train, binary.train), (pickled.test, binary.test)):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)


class Calling:
    def __reduce__(self):
        return print, ("called",)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (pickle.dumps(Calling(), 2), r"data_batch_1 cannot be read .*: it asks for (builtins|__builtin__)\.print"),
        (pickle.dumps(np.float64), "it asks for numpy.float64, which is no part of an array"),
        (pickle.dumps({b"labels": [1]}), "data_batch_1 must hold a dict with data and labels"),
        (pickle.dumps([1, 2])[:-3], "data_batch_1 cannot be read as a pickle of arrays"),
    ],
)
def test_pickles_are_not_run(tmp_path, capsys, raw, message):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        load("cifar10", tmp_path)
    assert not capsys.readouterr().out


def write_cifar100(folder, coarse_of=lambda fine: fine % 2) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, each in (("train", 8), ("test", 2)):
        records = rng.integers(0, 256, (4 * each, 3074), dtype=np.uint8)
        records[:, 1] = np.arange(4 * each) % 4
        records[:, 0] = [coarse_of(fine) for fine in records[:, 1]]
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "fine_label_names.txt").write_text("apple\naquarium_fish\nbaby\nbear\n")


@pytest.mark.parametrize("folder", ["cifar-100-binary", "cifar100/cifar-100-binary", "cifar100"])
def test_cifar100_binary(tmp_path, folder):
    write_cifar100(tmp_path / folder)
    source = load("cifar100", tmp_path)
    assert source.class_names == ("apple", "aquarium_fish", "baby", "bear")
    assert source.train.inputs.shape == (32, 3, 32, 32)
    assert source.test.counts(4).tolist() == [2] * 4
    assert source.groups is not None
    assert source.groups.tolist() == [0, 1, 0, 1]
    raw = np.frombuffer((tmp_path / folder / "test.bin").read_bytes(), np.uint8)
    assert float(source.test.inputs[0, 0, 0, 0]) == pytest.approx((raw[2] / 255 - 0.5071) / 0.2673, rel=1e-4)


@pytest.mark.parametrize("folder", ["cifar-100-python", "cifar100/cifar-100-python", "cifar100"])
def test_cifar100_pickled(tmp_path, folder):
    """The same numbers as the binary version, hierarchical noise included."""
    write_cifar100(tmp_path / "binary" / "cifar100")
    (tmp_path / folder).mkdir(parents=True)
    for name in ("train", "test"):
        records = np.frombuffer((tmp_path / "binary" / "cifar100" / f"{name}.bin").read_bytes(), np.uint8)
        records = records.reshape(-1, 3074)
        labels = {b"coarse_labels": records[:, 0].tolist(), b"fine_labels": records[:, 1].tolist()}
        batch = {b"filenames": [b"one.png"], b"batch_label": b"one", b"data": records[:, 2:].copy(), **labels}
        (tmp_path / folder / name).write_bytes(as_python_2(batch))
    names = {b"fine_label_names": [b"apple", b"aquarium_fish", b"baby", b"bear"], b"coarse_label_names": [b"a", b"b"]}
    (tmp_path / folder / "meta").write_bytes(as_python_2(names))
    pickled, binary = load("cifar100", tmp_path), load("cifar100", tmp_path / "binary")
    assert pickled.class_names == binary.class_names
    assert torch.equal(pickled.groups, binary.groups)
    for ours, theirs in ((pickled.train, binary.train), (pickled.test, binary.test)):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)
    task = biased(pickled, noise="hierarchical", rate=0.5, meta_per_class=2)
    assert torch.equal(task.train.targets % 2, task.clean_targets % 2)  # within the group
    assert not torch.equal(task.train.targets, task.clean_targets)


def test_cifar100_pickles_are_not_run(tmp_path, capsys):
    (tmp_path / "cifar100").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar100" / name).write_bytes(pickle.dumps(Calling(), 2))
    with pytest.raises(ValueError, match=r"meta cannot be read .*: it asks for (builtins|__builtin__)\.print"):
        load("cifar100", tmp_path)
    assert not capsys.readouterr().out
    (tmp_path / "cifar100" / "meta").write_bytes(as_python_2({b"fine_label_names": [b"apple"]}))
    (tmp_path / "cifar100" / "train").write_bytes(as_python_2({b"fine_labels": [1]}))
    with pytest.raises(ValueError, match="train must hold a dict with data and fine_labels and coarse_labels"):
        load("cifar100", tmp_path)


def test_cifar100_that_cannot_be_read(tmp_path):
    with pytest.raises(DataNotFound, match=r"CIFAR-100: 'train\.bin' or 'train' not found"):
        load("cifar100", tmp_path)
    rng = np.random.default_rng(0)
    write_cifar100(tmp_path / "mixed" / "cifar100", coarse_of=lambda fine: rng.integers(2))
    with pytest.raises(ValueError, match="each of the 4 fine labels must come with one coarse label"):
        load("cifar100", tmp_path / "mixed")
    (tmp_path / "mixed" / "cifar100" / "train.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="expected records of 3074 bytes, got 3 bytes"):
        load("cifar100", tmp_path / "mixed")


def write_planetoid(root) -> None:
    """A ring of 640 nodes as npz in one folder and as pickles in another; two test numbers belong to no node."""
    from scipy.sparse import csr_matrix

    nodes, classes, words, missing = 640, 3, 7, [601, 617]
    rng = np.random.default_rng(0)
    features = rng.integers(0, 2, (nodes, words)).astype(np.float32)
    targets = np.arange(nodes) % classes
    features[missing], targets[missing] = 0, -1
    kept = np.setdiff1d(np.arange(nodes), missing)
    edges = np.stack([kept, np.roll(kept, -1)])
    edges = np.unique(np.concatenate([edges, edges[::-1]], 1), axis=1)
    rows = csr_matrix(features)
    split = {
        "train_idx": np.arange(12),
        "val_idx": np.arange(12, 512),
        "test_idx": np.setdiff1d(np.arange(600, nodes), missing),
    }
    stored = {
        "x_indptr": rows.indptr,
        "x_indices": rows.indices,
        "x_shape": rows.shape,
        "edge_index": edges,
        "y": targets,
    }
    (root / "npz").mkdir()
    np.savez(root / "npz" / "cora.npz", **stored, **split)
    neighbours = defaultdict(list)
    for node, other in edges.T.tolist():
        neighbours[node] += [other] * (1 + (node < other))  # some are named twice
    neighbours[5].append(5)
    test = rng.permutation(split["test_idx"])
    one_hot = np.eye(classes, dtype=np.int32)[targets]
    parts = {"y": one_hot[:12], "ally": one_hot[:600], "ty": one_hot[test], "graph": neighbours}
    parts |= {"x": rows[:12], "allx": rows[:600], "tx": rows[test]}
    (root / "planetoid").mkdir()
    for name, part in parts.items():
        raw = as_python_2(part).replace(b"scipy.sparse._csr", b"scipy.sparse.csr")
        (root / "planetoid" / f"ind.cora.{name}").write_bytes(raw)
    (root / "planetoid" / "ind.cora.test.index").write_text("".join(f"{node}\n" for node in test))


def test_planetoid_as_published(tmp_path):
    """The same graph as from the archive, whatever the order of the test nodes."""
    write_planetoid(tmp_path)
    pickled, archived = load_graph("cora", tmp_path), load_graph("cora", tmp_path / "npz")
    for entry in fields(archived):
        ours, theirs = getattr(pickled, entry.name), getattr(archived, entry.name)
        assert ours == theirs if entry.name == "name" else torch.equal(ours, theirs), entry.name
    assert len(load("cora", tmp_path).test) == 38


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("allx", Calling(), r"allx cannot be read .*: it asks for (builtins|__builtin__)\.print"),
        ("graph", Calling(), r"graph cannot be read .*: it asks for (builtins|__builtin__)\.print"),
        ("tx", [1, 2], "tx must hold a CSR matrix, as the published file does; got list"),
        ("graph", [1], "graph must hold a dict, as the published file does; got list"),
    ],
)
def test_planetoid_that_cannot_be_read(tmp_path, capsys, part, value, message):
    write_planetoid(tmp_path)
    (tmp_path / "planetoid" / f"ind.cora.{part}").write_bytes(pickle.dumps(value, 2))
    with pytest.raises(ValueError, match=message):
        load("cora", tmp_path)
    assert not capsys.readouterr().out


def test_cifar10_archive_of_jpegs(tmp_path):
    import io

    from PIL import Image

    pictures = []
    for shade in (0, 255):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (shade, shade, shade)).save(buffer, "JPEG", quality=75)
        pictures.append(buffer.getvalue())
    shared = 100
    assert pictures[0][:shared] == pictures[1][:shared]
    bodies = [picture[shared:] for picture in pictures]
    (tmp_path / "cifar10").mkdir()
    np.savez(
        tmp_path / "cifar10" / "cifar10_jpeg.npz",
        allow_pickle=False,
        header=np.frombuffer(pictures[0][:shared], np.uint8),
        body=np.frombuffer(b"".join(bodies), np.uint8),
        offsets=np.cumsum([0] + [len(body) for body in bodies]).astype(np.int32),
        label=np.array([3, 7], np.uint8),
        is_test=np.array([False, True]),
    )
    source = load("cifar10", tmp_path)
    assert source.train.targets.tolist() == [3]
    assert source.test.targets.tolist() == [7]
    assert float(source.train.inputs.max()) < 0 < float(source.test.inputs.min())


@pytest.mark.parametrize("packed", [False, True])
def test_ag_news_as_published(tmp_path, packed):
    (tmp_path / "ag_news").mkdir()
    text = '"1","Markets rise, markets fall","A ""good"" day"\n"4","Robots rise","A good robot"\n'
    for name in ("train.csv", "test.csv"):
        raw = text.encode()
        (tmp_path / "ag_news" / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)
    source = load("ag-news", tmp_path)
    assert source.train.targets.tolist() == [0, 3]
    assert source.train.inputs.dtype == torch.int64
    # "good", "a", "rise" and "markets" come twice and have numbers; the rest is unknown (1); 0 is the end.
    lengths = (source.train.inputs != 0).sum(1).tolist()
    assert lengths == [7, 5]
    assert source.train.inputs[0, 0] == source.train.inputs[0, 2]
    assert (source.train.inputs[0] == 1).sum() == 2
    assert source.readable is not None
    assert source.readable[int(source.train.ids[1])] == "Robots rise A good robot"
    lengths = load("ag-news", tmp_path, encode=lambda texts: torch.tensor([[len(text)] for text in texts]))
    assert lengths.train.inputs.tolist() == lengths.test.inputs.tolist() == [[39], [24]]


def test_a_tokenizer_needs_texts():
    with pytest.raises(ValueError, match=r"a tokenizer needs a set of texts \(ag-news, .*\), got 'digits'"):
        load("digits", encode=lambda texts: torch.zeros(1, 1, dtype=torch.int64))


def test_ag_news_with_a_header(tmp_path):
    for name, content in (
        ("train_pool.csv.gz", "label,human_label,text\n2,-1,Shares up\n"),
        ("test.csv.gz", "3,Shares,up\n"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    source = load("ag-news", tmp_path)
    assert source.train.targets.tolist() == source.test.targets.tolist() == [2]


def test_ag_news_with_human_labels_keeps_the_truth(tmp_path):
    rows = "".join(f"{k % 4},{(k + 1) % 4 if k % 3 == 0 else k % 4},text {k % 4}\n" for k in range(40)) + "1,-1,other\n"
    (tmp_path / "train_pool.csv.gz").write_bytes(gzip.compress(b"label,human_label,text\n" + rows.encode()))
    (tmp_path / "test.csv").write_text("3,Shares,up\n")
    source = load("ag-news-human", tmp_path)
    assert len(source.train) == 40
    assert source.clean_targets is not None
    task = biased(source, meta_per_class=2)
    # The text's number is the true class: true labels in the meta set, the workers' in training.
    assert task.meta.counts(4).tolist() == [2] * 4
    assert (task.meta.ids % 4).tolist() == task.meta.targets.tolist()
    assert (task.train.ids % 4).tolist() == task.clean_targets.tolist()
    assert (task.train.targets != task.clean_targets).any()
    with pytest.raises(ValueError, match="noisy already"):
        biased(source, noise="uniform", rate=0.1)


def test_graph(tmp_path):
    np.savez(
        tmp_path / "cora.npz",
        allow_pickle=False,
        x_indptr=np.array([0, 2, 2, 3], np.int32),
        x_indices=np.array([0, 3, 1], np.int16),
        x_shape=np.array([3, 4]),
        edge_index=np.array([[0, 1], [1, 0]], np.int16),
        y=np.array([0, 1, -1], np.int8),
        train_idx=np.array([0], np.int16),
        val_idx=np.array([1], np.int16),
        test_idx=np.array([2], np.int16),
    )
    graph = load_graph("cora", tmp_path)
    assert graph.features.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert graph.edges.dtype == torch.int64
    assert graph.targets.tolist() == [0, 1, -1]
    with pytest.raises(DataNotFound, match="planetoid"):
        load_graph("citeseer", tmp_path)
    with pytest.raises(ValueError, match="there are: cora, citeseer"):
        load_graph("pubmed", tmp_path)


def test_clue_drops_second_copies(tmp_path):
    rows = [{"label": 0, "label_name": "a", "text": "你 好"}, {"label": 1, "label_name": "b", "text": "再见"}]
    train = "\n".join(
        json.dumps(row, ensure_ascii=False) for row in [*rows, {**rows[0], "label": 1, "label_name": "b"}]
    )
    (tmp_path / "cic_train.jsonl").write_text(train, encoding="utf-8")
    (tmp_path / "cic_test_public.jsonl").write_text(train, encoding="utf-8")
    source = load("cic", tmp_path)
    assert source.train.targets.tolist() == [0, 1]
    assert source.class_names == ("a", "b")
    assert (source.train.inputs != 0).sum(1).tolist() == [2, 2]


def test_clue_leaves_out_classes_too_small_to_divide(tmp_path):
    # The last text holds a line separator that is none of JSON lines'.
    texts = [("rare", 0), ("one", 1), ("two", 1), ("three", 2), ("fo\u2028ur", 2)]
    rows = [{"label": label, "label_name": f"class {label}", "text": text} for text, label in texts]
    for part in ("train", "test_public"):
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / f"iflytek_{part}.jsonl").write_text(lines, encoding="utf-8")
    source = load("iflytek", tmp_path)
    assert source.class_names == ("class 1", "class 2")
    assert source.train.targets.tolist() == source.test.targets.tolist() == [0, 0, 1, 1]


def write_clue(folder, name: str, texts: dict[str, int]) -> None:
    rows = [{"label": label, "label_name": f"class {label}", "text": text} for text, label in texts.items()]
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_clue_by_its_other_parts(tmp_path):
    write_clue(tmp_path, "tnews_train.jsonl", {"one": 0, "two": 1})
    write_clue(tmp_path, "tnews_extra.jsonl", {"three": 2, "four": 0})
    write_clue(tmp_path, "tnews_dev.jsonl", {"two": 1, "five": 0, "six": 2})
    write_clue(tmp_path, "tnews_test_public.jsonl", {"seven": 1, "eight": 2})
    plain, more, dev = (load(name, tmp_path) for name in ("tnews", "tnews-extra", "tnews-dev"))
    assert (plain.name, more.name, dev.name) == ("tnews", "tnews-extra", "tnews-dev")
    assert plain.readable == dev.readable == ["one", "two"]
    assert more.readable == ["one", "two", "three", "four"]
    assert more.class_names == ("class 0", "class 1", "class 2")
    assert (plain.test.targets.tolist(), more.test.targets.tolist()) == ([1], [1, 2])
    # "two" stands in training, and training knows nothing of class 2.
    assert dev.test.targets.tolist() == [0]
    with pytest.raises(DataNotFound, match=r"CIC: 'cic_train\.jsonl\.gz'"):
        load("cic-dev", tmp_path)


def test_tokens():
    assert words("Don't PANIC: it's 42_x!") == ["don", "t", "panic", "it", "s", "42", "x"]
    assert characters("你 好\n!") == ["你", "好", "!"]


def test_tables(tmp_path):
    lines = "\n".join(
        f"{age},60,{nodes},{1 + (nodes > 10)}" for age, nodes in zip(range(30, 70), range(40), strict=True)
    )
    (tmp_path / "haberman.data").write_text(lines)
    source = load("haberman", tmp_path)
    assert source.class_names == ("died", "survived")
    assert (source.train.counts(2) + source.test.counts(2)).tolist() == [29, 11]
    assert not set(source.train.ids.tolist()) & set(source.test.ids.tolist())
    torch.testing.assert_close(source.train.inputs[:, 0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_fraud_keeps_one_of_each_transaction(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((30, 30))
    features[5] = features[4]
    fraud = np.arange(30) < 10
    header = ",".join(['"Time"', *(f'"V{k}"' for k in range(1, 29)), '"Amount"', '"Class"'])
    rows = [",".join([*map(str, row), f'"{int(label)}"']) for row, label in zip(features, fraud, strict=True)]
    (tmp_path / "creditcard.csv").write_text("\n".join([header, *rows]))
    source = load("credit-fraud", tmp_path)
    assert (source.train.counts(2) + source.test.counts(2)).tolist() == [9, 20]
    assert source.train.inputs.shape[1] == 29


def test_fraud_by_its_pools(tmp_path):
    features = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    pool = np.repeat(np.array([0, 1, 2, 3], np.uint8), 10)
    np.savez(tmp_path / "creditcard_fraud_subset.npz", allow_pickle=False, X=features, y=pool == 3, pool=pool)
    spread, everything = load("credit-fraud", tmp_path), load("credit-fraud-all", tmp_path)
    assert (spread.train.counts(2) + spread.test.counts(2)).tolist() == [10, 10]
    assert (everything.train.counts(2) + everything.test.counts(2)).tolist() == [10, 30]
    assert (spread.name, everything.name) == ("credit-fraud", "credit-fraud-all")


@pytest.mark.parametrize(
    "name", ["cifar10", "ag-news", "cic", "tnews", "iflytek", "credit-fraud", "credit-default", "haberman", "cora"]
)
def test_missing_sets_say_where_they_are_published(name, tmp_path):
    with pytest.raises(DataNotFound, match="published: https://"):
        load(name, tmp_path)
