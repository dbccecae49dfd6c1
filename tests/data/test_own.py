"""Data of one's own: tables and texts, and what is said about those that cannot be read."""

import csv
import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metakern.data import DataNotFound, load, short_name
from metakern.data.split import standardised, stratified
from metakern.trainers.audit_command import run_audit
from metakern.trainers.config import TrainConfig
from metakern.trainers.task import make_task


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"csv:{path}"


def table(n: int = 40) -> list[str]:
    """A quarter of the rows are of the class "yes"."""
    return ["a, b,kind", *(f"{k},{k * k % 7},{'yes' if k % 4 == 0 else 'no'}" for k in range(n))]


def test_numbers(tmp_path):
    source = load(write(tmp_path / "own.csv", table()), label="kind")
    assert source.class_names == ("yes", "no")  # the rarer first
    assert source.train.counts(2).tolist() == [8, 24]
    assert source.test.counts(2).tolist() == [2, 6]
    assert source.name == "own"
    everything = sorted([*source.train.ids.tolist(), *source.test.ids.tolist()])
    assert everything == list(range(40))
    torch.testing.assert_close(source.train.inputs.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(source.train.inputs.std(0), torch.ones(2))
    again = load(f"csv:{tmp_path / 'own.csv'}", label="kind")
    assert torch.equal(source.test.ids, again.test.ids)
    # The statistics are those of the training rows, also for the others.
    a, train = torch.arange(40.0), source.train.ids
    torch.testing.assert_close(source.test.inputs[:, 0], (a[source.test.ids] - a[train].mean()) / a[train].std())


@pytest.mark.parametrize("majority", [None, 0.7])
def test_rows_whose_label_is_certain_are_the_meta_set(tmp_path, majority):
    lines = ["a,kind,split", *(f"{k},{k % 2},{'meta' if k < 6 else 'train'}" for k in range(60))]
    data = write(tmp_path / "own.csv", lines)
    source = load(data, label="kind")
    assert source.meta is not None
    assert source.meta.ids.tolist() == list(range(6))
    assert (len(source.train), len(source.test)) == (44, 10)
    task = make_task(TrainConfig("l2rw", data=data, label="kind", majority=majority, meta_per_class=20))
    assert task.meta.ids.tolist() == list(range(6))
    assert len(task.train) == (44 if majority is None else 31)
    assert not {*task.meta.ids.tolist()} & {*task.train.ids.tolist(), *task.test.ids.tolist()}


def test_columns_that_are_left_out(tmp_path):
    """As if they were not in the file, which is what `split` is then as well."""
    lines = ["name,a,kind,code,split", *(f"name{k},{k},{k % 2},{k},{'meta' if k < 9 else 'train'}" for k in range(40))]
    data = write(tmp_path / "own.csv", lines)
    source = load(data, label="kind", leave_out="name, code")
    assert source.readable is not None
    assert source.readable[3] == "a 3"
    assert source.train.inputs.shape == (25, 1)
    assert source.meta is not None
    assert load(data, label="kind", leave_out="name,code,split").meta is None
    # A file to test on need not have them.
    write(tmp_path / "test.csv", ["a,kind", "1,0", "2,1"])
    assert len(load(f"{data},{tmp_path / 'test.csv'}", label="kind", leave_out="name,code,split").test) == 2
    config = TrainConfig("l2rw", data=data, label="kind", leave_out="name,code")
    assert torch.equal(make_task(config).test.inputs, source.test.inputs)
    assert config.identity() != TrainConfig("l2rw", data=data, label="kind", leave_out="name").identity()


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [
        ("nme", "--leave-out 'nme' is not a column of .*; there are a, b, kind"),
        ("kind", "--label 'kind' is not a column of .*; there are a, b"),
        ("a,b", "there is no column to learn from"),
    ],
)
def test_columns_that_cannot_be_left_out(tmp_path, leave_out, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "own.csv", table()), label="kind", leave_out=leave_out)
    with pytest.raises(ValueError, match="--leave-out names a column of --data csv:FILE, got 'digits'"):
        load("digits", leave_out=leave_out)


def test_missing_cells_are_the_mean(tmp_path):
    lines = ["a,kind", *(f"{'' if k == 3 else k},{k % 3}" for k in range(30))]
    source = load(write(tmp_path / "own.csv", lines), label="kind")
    part = source.train if 3 in source.train.ids else source.test
    assert part.inputs[part.ids == 3].tolist() == [[0.0]]
    assert source.class_names == ("0", "1", "2")


def test_kinds_are_columns_of_0_and_1(tmp_path):
    """The words of the training rows, in the order of the alphabet; others are none of them, empty cells the mean."""
    colours = ["red", "", "blue", "red", *["red", "blue"] * 3, "green", "green", "blue", ""]
    lines = [
        "a,colour,kind,split",
        *(f"{k},{colour},{k % 2},{'train' if k < 10 else 'test'}" for k, colour in enumerate(colours)),
    ]
    source = load(write(tmp_path / "own.csv", lines), label="kind")
    assert source.train.inputs.shape == (10, 3)
    red = torch.tensor([1.0, torch.nan, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, torch.nan], dtype=torch.float64)
    blue = torch.tensor([0, torch.nan, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1, torch.nan], dtype=torch.float64)
    expected = standardised(torch.stack([torch.arange(14.0).double(), blue, red], 1), torch.arange(10)).float()
    assert torch.equal(torch.cat([source.train.inputs, source.test.inputs]), expected)
    assert source.train.inputs[1, 1:].tolist() == [0.0, 0.0]
    assert source.readable[0] == "a 0, colour red"


def test_split_column_and_test_file(tmp_path):
    marked = ["a,kind,split", *(f"{k},{k % 2},{'test' if k > 7 else 'train'}" for k in range(12))]
    source = load(write(tmp_path / "own.csv", marked), label="kind")
    assert source.train.ids.tolist() == list(range(8))
    assert source.test.ids.tolist() == [8, 9, 10, 11]
    assert source.train.inputs.shape[1] == 1
    train, test = (write(tmp_path / f"{name}.csv", table(12)) for name in ("train", "test"))
    source = load(f"{train},{test.removeprefix('csv:')}", label="kind")
    assert source.train.ids.tolist() == list(range(12))
    assert source.test.ids.tolist() == list(range(12, 24))
    assert source.origins[11] == (str(tmp_path / "train.csv"), 12)
    assert source.origins[12] == (str(tmp_path / "test.csv"), 1)


def test_texts(tmp_path):
    words = ["note,text,kind", *(f"x,the word number{k % 3} again,{k % 2}" for k in range(20))]
    source = load(write(tmp_path / "words.csv", words), label="kind")
    assert source.train.inputs.dtype == torch.int64
    assert (source.train.inputs != 0).sum(1).unique().tolist() == [4]
    assert source.readable[5] == "the word number2 again"
    signs = ["body,kind", *(f"今天天气很好,{k % 2}" for k in range(20))]
    source = load(write(tmp_path / "signs.csv", signs), label="kind")
    assert (source.train.inputs != 0).sum(1).unique().tolist() == [6]


def grouped(n: int = 60) -> list[str]:
    kinds = ("cat", "animal"), ("dog", "animal"), ("car", "machine")
    return ["a,kind,realm", *(f"{k},{kinds[k % 3][0]},{kinds[k % 3][1]}" for k in range(n))]


def test_groups_of_classes(tmp_path):
    data = write(tmp_path / "own.csv", grouped())
    source = load(data, label="kind", group="realm")
    assert source.class_names == ("car", "cat", "dog")
    assert source.groups is not None
    assert source.groups.tolist() == [1, 0, 0]
    assert source.train.inputs.shape == (48, 1)
    config = TrainConfig("uniform", data=data, label="kind", group="realm", noise="hierarchical", noise_rate=0.5)
    task = make_task(config)
    wrong = task.train.targets != task.clean_targets
    assert set(task.clean_targets[wrong].tolist()) == set(task.train.targets[wrong].tolist()) == {1, 2}
    assert task.corruption is not None
    assert task.corruption.tolist() == [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]


def test_groups_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"--group 'b' is not a column of .*; there are a, kind, realm"):
        load(write(tmp_path / "own.csv", grouped()), label="kind", group="b")
    with pytest.raises(ValueError, match="the class 'cat' is in two groups of 'realm': 'animal' and 'machine'"):
        load(write(tmp_path / "two.csv", [*grouped(), "1,cat,machine"]), label="kind", group="realm")
    with pytest.raises(ValueError, match="--group names a column of --data csv:FILE, got 'digits'"):
        load("digits", group="kind")


@pytest.mark.parametrize(
    ("lines", "label", "message"),
    [
        (table(), None, "--label must name the column of the classes, one of a, b, kind"),
        (table(), "class", "--label 'class' is not a column of .*; there are a, b, kind"),
        (["a,kind", "1,x", "2,"], "kind", "row 2 of .*own.csv has no 'kind'"),
        (["a,kind", "1,0", "2,1", "3,nan"], "kind", "row 3 of .*own.csv has 'nan' as its 'kind', where all others"),
        (["a,kind", "1,x", "2,y,z"], "kind", "row 2 of .* does not have 2 cells"),
        (["a,kind", "1,x", "2,x"], "kind", "two classes at least, got \\['x'\\]"),
        (
            ["a,b,kind", *(f"1,name{k},{k % 2}" for k in range(12))],
            "kind",
            "neither numbers nor kinds .*: b \\(12 different words in 12 rows\\); leave .*, by --leave-out b; call",
        ),
        (
            ["a,b,kind", "1,2,x", "1,inf,y", "NA,3,x", *["1,2,x", "1,2,y"] * 5],
            "kind",
            "a \\(numbers, but 'NA' in row 3 of .*own.csv\\), b \\(numbers, but 'inf' in row 2 of .*own.csv\\)",
        ),
        (["a,kind", *["1,x", "2,y"] * 5, "1e999,x"], "kind", "a \\(numbers, but '1e999' in row 11 of .*\\)"),
        (["split,kind", "train,x", "train,y"], "kind", "no column to learn from"),
        (["a;kind", "1;x", "2;y"], "kind", "separated by commas; the head of .* has none: 'a;kind'"),
        ([",a,kind", "0,1,x", "1,2,y"], "kind", "column 1 of .* has no name.*index=False"),
        (["a,b,a,kind", "1,2,3,x", "2,3,4,y"], "kind", "more than one column 'a'"),
        (
            ["a,kind,split", "1,x,train", "2,y,dev"],
            "kind",
            "must hold train, and may hold test and meta, got \\['dev', 'train'\\]",
        ),
        (["a,kind,split", "1,x,test", "2,y,test"], "kind", "must hold train, and may hold"),
        (
            ["a,kind,split", *(f"{k},{k % 2},train" for k in range(12)), "1,0,meta"],
            "kind",
            "marked as meta must have each class; there is none of: 1",
        ),
        (["a,kind", "1,x", "2,y"], "kind", "no class has five rows.*: 2 rows of 2 classes"),
        (["a,kind"], "kind", "has no rows"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, lines, label, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "own.csv", lines), label=label)


def test_other_refusals(tmp_path):
    (tmp_path / "latin.csv").write_bytes("size,kind\n1,groß\n2,klein".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        load(f"csv:{tmp_path / 'latin.csv'}", label="kind")
    both = (write(tmp_path / name, [head, "1,x", "2,y"]) for name, head in (("a.csv", "a,kind"), ("b.csv", "b,kind")))
    with pytest.raises(ValueError, match=r"lacks columns of .*: a"):
        load(",".join(both).replace(",csv:", ","), label="kind")
    with pytest.raises(DataNotFound, match="no file"):
        load(f"csv:{tmp_path / 'absent.csv'}", label="kind")
    with pytest.raises(ValueError, match="--label names a column of --data csv:FILE, got 'digits'"):
        load("digits", label="kind")
    with pytest.raises(DataNotFound, match="no folder"):
        load(f"images:{tmp_path / 'absent'}")
    with pytest.raises(ValueError, match="has no folders of images"):
        load(f"images:{tmp_path}")


def test_a_compressed_table(tmp_path):
    plain = load(write(tmp_path / "own.csv", table()), label="kind")
    (tmp_path / "own.csv.gz").write_bytes(gzip.compress((tmp_path / "own.csv").read_bytes()))
    compressed = load(f"csv:{tmp_path / 'own.csv.gz'}", label="kind")
    assert torch.equal(plain.train.inputs, compressed.train.inputs)
    assert compressed.name == "own"
    assert short_name(f"csv:{tmp_path / 'own.csv.gz'}") == "csv-own"
    (tmp_path / "own.csv.gz").write_bytes(gzip.compress(b"a,b\n" * 99)[:-9])
    with pytest.raises(ValueError, match=r"own\.csv\.gz is no whole gzip file"):
        load(f"csv:{tmp_path / 'own.csv.gz'}", label="kind")


def test_a_long_text(tmp_path):
    limit = csv.field_size_limit()
    lines = ["text,kind", *(f"{'word ' * 50_000}end{k},{k % 2}" for k in range(10))]
    assert len(load(write(tmp_path / "own.csv", lines), label="kind").train) == 8
    assert csv.field_size_limit() == limit


def test_classes_of_the_test_rows_must_be_known(tmp_path):
    """The usual case: labels that are whole numbers in one file and have a decimal point in the other."""
    train = write(tmp_path / "train.csv", ["a,kind", *(f"{k},{k % 3}" for k in range(60))])
    test = write(tmp_path / "test.csv", ["a,kind", *(f"{k},{k % 3}.0" for k in range(60))]).removeprefix("csv:")
    with pytest.raises(
        ValueError, match=r"rows to test on are of classes that no training example has: '0\.0', '1\.0'"
    ):
        load(f"{train},{test}", label="kind")
    marked = ["a,kind,split", *(f"{k},{k % 3},{'meta' if k % 3 == 2 else 'train'}" for k in range(60))]
    with pytest.raises(ValueError, match="rows marked as meta are of classes that no training example has: '2'"):
        load(write(tmp_path / "own.csv", marked), label="kind")


def test_a_class_of_one_row(tmp_path):
    lines = ["a,kind", *(f"{k},{k % 2}" for k in range(40)), "3,rare"]
    config = TrainConfig("l2rw", data=write(tmp_path / "own.csv", lines), label="kind")
    message = "smallest class, 'rare', got 5; no number will do: give that class a second example, .* split=meta"
    with pytest.raises(ValueError, match=message):
        make_task(config)
    with pytest.raises(ValueError, match=message):
        run_audit(replace(config, method="uniform"), tmp_path / "audit", progress=False)
    plain = make_task(replace(config, method="uniform"))
    rare = plain.class_names.index("rare")
    assert (plain.meta.counts(3)[rare], plain.train.counts(3)[rare]) == (0, 1)
    assert sorted(plain.meta.counts(3).tolist()) == [0, 5, 5]
    marked = [lines[0] + ",split", *(f"{line},train" for line in lines[1:]), "3,rare,meta", "1,0,meta", "2,1,meta"]
    write(tmp_path / "own.csv", marked)
    task = make_task(config)
    assert (len(task.meta), int((task.train.targets == task.class_names.index("rare")).sum())) == (3, 1)


def test_names_that_python_reads_as_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"place \(20 different words in 20 rows\)"):
        load(write(tmp_path / "own.csv", ["a,place,kind", *(f"{k},1_{k},{k % 2}" for k in range(20))]), label="kind")


def test_numbers_whose_squares_overflow(tmp_path):
    lines = ["a,b,kind", *(f"{k},{'1.7976931348623157e308' if k == 3 else k},{k % 2}" for k in range(20))]
    with pytest.raises(ValueError, match=r"the column 'b' has numbers beyond 1e\+100"):
        load(write(tmp_path / "own.csv", lines), label="kind")


def test_a_class_called_nan_comes_after_numbers(tmp_path):
    lines = ["a,kind", *(f"{k},{('2', 'nan', 'roti', '10')[k % 4]}" for k in range(40))]
    assert load(write(tmp_path / "own.csv", lines), label="kind").class_names == ("2", "10", "nan", "roti")


@pytest.mark.parametrize(
    ("line", "message"),
    [("1,", r"row 2 of \S*test\.csv has no 'kind'"), ("NA,x", r"'NA' in row 2 of \S*test\.csv")],
)
def test_rows_of_the_second_file_are_named_by_it(tmp_path, line, message):
    train = write(tmp_path / "train.csv", ["a,kind", *["1,x", "2,y"] * 5])
    test = write(tmp_path / "test.csv", ["a,kind", "1,x", line])
    with pytest.raises(ValueError, match=message):
        load(f"{train},{test.removeprefix('csv:')}", label="kind")


def test_a_task_takes_the_rows_as_they_are(tmp_path):
    config = TrainConfig("uniform", data=write(tmp_path / "own.csv", table(200)), label="kind", train_size=10)
    task = make_task(config)
    assert task.meta.counts(2).tolist() == [5, 5]
    assert task.train.counts(2).tolist() == [35, 115]
    parts = [set(part.ids.tolist()) for part in (task.train, task.meta, task.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200
    assert config.name() == "csv-own-uniform-0"
    assert short_name("digits") == "digits"


def test_stratified_and_standardised_by_hand():
    targets = torch.tensor([0] * 10 + [1] * 4)
    train, test = stratified(targets, 2)
    assert torch.bincount(targets[test], minlength=2).tolist() == [2, 0]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(14))
    values = torch.tensor([[1.0], [3.0], [float("nan")], [5.0]])
    found = standardised(values, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([[-1.0], [1.0], [0.0], [3.0]]) / 2**0.5)
    # The unit of a column does not count; one that never changes has none: what is new in a test row stays small.
    assert torch.equal(standardised(values * 2**-40, torch.tensor([0, 1])), found)
    constant = torch.full((5, 1), 0.1)
    constant[4] = 1.1
    torch.testing.assert_close(standardised(constant, torch.arange(4)), constant - 0.1)
