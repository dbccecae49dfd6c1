"""The user's own table: numbers and categories, or a column of texts."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from metakern.data.columns import features, is_number
from metakern.data.examples import Examples, Origin, Source
from metakern.data.folder import DataNotFound, read_text
from metakern.data.labels import numbered
from metakern.data.split import require_every_class, require_known_classes, stratified
from metakern.data.text import Encode, by_frequency, characters, words

LENGTH = 64  # tokens of a text that are read


def csv_file(
    names: str,
    label: str | None,
    encode: Encode | None = None,
    group: str | None = None,
    leave_out: Sequence[str] = (),
) -> Source:
    """FILE or FILE,TESTFILE, with a header row; the column `label` holds the classes, `group` the group of each class.

    Files may be compressed by gzip. Columns of numbers and of categories become `features`. A column "text", or a
    single column without numbers, is read as text, by words, or by characters if there are few spaces; all other
    columns are then ignored. The column "split" may say train, test, or meta for rows whose label is certain. The test
    set is TESTFILE, or the rows whose "split" is test, or a fifth of each class, the same in every run. Ids are row
    numbers across both files; the first row below the header is 0. The columns `leave_out` are ignored.
    Raises: ValueError for columns that are missing or cannot be read, DataNotFound for a missing file.
    """
    paths = [Path(name).expanduser() for name in names.split(",")]
    if len(paths) > 2:
        raise ValueError(f"csv: takes FILE or FILE,TESTFILE, got {len(paths)} files")
    tables = [_rows(path) for path in paths]
    _require_columns(paths[0], tables[0], [("--leave-out", name) for name in leave_out])
    tables = [[{name: row[name] for name in row if name not in leave_out} for row in table] for table in tables]
    rows = [row for table in tables for row in table]
    head = list(rows[0])
    if label is None:
        raise ValueError(f"csv: --label must name the column of the classes, one of {', '.join(head)}")
    _require_columns(paths[0], rows, [("--label", label), ("--group", group)])
    lacking = sorted({*head} - {"split"} - {*tables[-1][0]})
    if lacking:
        raise ValueError(f"csv: {paths[-1]} lacks columns of {paths[0]}: {', '.join(lacking)}")
    origins = [Origin(str(path), k + 1) for path, own in zip(paths, tables, strict=True) for k in range(len(own))]
    labels = [row[label].strip() for row in rows]
    _require_labels(labels, label, origins)
    targets, class_names = numbered(labels)
    groups = None if group is None else _groups(rows, label, group, class_names)
    columns = [name for name in head if name not in (label, group, "split")]
    text = _text_column(rows, columns)
    parts = _division(rows, targets, len(class_names), len(tables[0]) if len(tables) == 2 else None)
    train, test, meta = parts
    for part, what in ((test, "csv: rows to test on"), (meta, "csv: rows marked as meta")):
        require_known_classes(part, train, targets, class_names, what)
    if len(meta):
        require_every_class(meta, targets, class_names)
    shown = [_shown(row, columns) if text is None else row[text] for row in rows]
    if text is None and encode is not None:
        raise ValueError("a tokenizer needs a column of texts, and this table has numbers and kinds")
    inputs = features(rows, columns, train, origins) if text is None else _tokens(shown, train, encode)
    training, testing, clean = (Examples(inputs[part], targets[part], part) for part in parts)
    return Source(
        table_name(names.split(",")[0]),
        training,
        testing,
        class_names,
        readable=shown,
        groups=groups,
        meta=clean if len(meta) else None,
        origins=origins,
    )


def _require_columns(path: Path, rows: list[dict[str, str]], named: Sequence[tuple[str, str | None]]) -> None:
    """Raise ValueError if an option names a column that the table does not have."""
    for option, column in named:
        if column is not None and column not in rows[0]:
            raise ValueError(f"csv: {option} {column!r} is not a column of {path}; there are {', '.join(rows[0])}")


def _require_labels(labels: Sequence[str], column: str, origins: Sequence[Origin]) -> None:
    """Raise ValueError if a row has no label, or "nan" among numbers, which is what a missing one becomes."""
    numbers = all(map(is_number, labels))
    for name, origin in zip(labels, origins, strict=True):
        if not name:
            raise ValueError(f"csv: row {origin.row} of {origin.file} has no {column!r}")
        if numbers and math.isnan(float(name)):
            raise ValueError(
                f"csv: row {origin.row} of {origin.file} has {name!r} as its {column!r}, where all others are numbers; "
                "leave out rows without a label, or give this class a name"
            )


def table_name(file: str) -> str:
    """The name of a table's file without folders and suffixes."""
    return Path(file.removesuffix(".gz")).stem


def _shown(row: dict[str, str], columns: list[str]) -> str:
    return ", ".join(f"{name} {row[name].strip()}" for name in columns)


def _groups(rows: list[dict[str, str]], label: str, group: str, class_names: tuple[str, ...]) -> Tensor:
    """The group of each class, [C] int64, in the order of the groups' names.

    Raises: ValueError when the rows of a class name several groups.
    """
    of_class: dict[str, str] = {}
    for row in rows:
        name, own = row[label].strip(), row[group].strip()
        if of_class.setdefault(name, own) != own:
            raise ValueError(f"csv: the class {name!r} is in two groups of {group!r}: {of_class[name]!r} and {own!r}")
    order = sorted(set(of_class.values()))
    return torch.tensor([order.index(of_class[name]) for name in class_names])


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataNotFound(f"csv: there is no file {str(path)!r}")
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    limit = csv.field_size_limit(sys.maxsize)  # a text may be long
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"csv: {path} cannot be read: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not rows or not reader.fieldnames:
        raise ValueError(f"csv: {path} has no rows below its head")
    names = [name.strip() for name in reader.fieldnames]
    _require_head(path, names)
    for k, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"csv: row {k + 1} of {path} does not have {len(names)} cells, as the head does")
    return [dict(zip(names, row.values(), strict=True)) for row in rows]


def _require_head(path: Path, names: list[str]) -> None:
    """Raise ValueError unless every column has a unique name."""
    if len(names) == 1 and any(sign in names[0] for sign in ";\t|"):
        raise ValueError(f"csv: cells are separated by commas; the head of {path} has none: {names[0]!r}")
    if "" in names:
        raise ValueError(
            f"csv: column {names.index('') + 1} of {path} has no name; give it one, or leave it out (pandas writes the "
            "numbers of rows into one, unless to_csv is told index=False)"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"csv: the head of {path} names more than one column {', '.join(map(repr, twice))}")


def _division(
    rows: list[dict[str, str]], targets: Tensor, classes: int, test_file_from: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers to train on, to test on, and those whose labels are certain, if any.

    Raises: ValueError when a part would be empty, or for another word in "split".
    """
    of_file = range(len(rows) if test_file_from is None else test_file_from)
    said = [rows[k]["split"].strip() for k in of_file] if "split" in rows[0] else ["train"] * len(of_file)
    if "train" not in said or not set(said) <= {"train", "test", "meta"}:
        raise ValueError(
            f"csv: the column 'split' must hold train, and may hold test and meta, got {sorted(set(said))}"
        )
    train, test, meta = (
        torch.tensor([k for k, own in enumerate(said) if own == word], dtype=torch.int64)
        for word in ("train", "test", "meta")
    )
    if test_file_from is not None:
        test = torch.cat([test, torch.arange(test_file_from, len(rows))])
    elif not len(test):
        kept, held = stratified(targets[train], classes)
        train, test = train[kept], train[held]
    if not len(test):
        raise ValueError(
            f"csv: no class has five rows, of which one is for testing: {len(rows)} rows of {classes} classes; add "
            "rows, or a test file"
        )
    return train, test, meta


def _text_column(rows: list[dict[str, str]], columns: list[str]) -> str | None:
    """The column of texts; None if the columns are numbers and categories.

    Raises: ValueError if there is no column.
    """
    if "text" in columns:
        return "text"
    if not columns:
        raise ValueError("csv: there is no column to learn from besides that of the classes")
    alone = columns[0] if len(columns) == 1 else None
    return alone if alone and 2 * sum(is_number(row[alone]) for row in rows) < len(rows) else None


def _tokens(texts: list[str], train: Tensor, encode: Encode | None) -> Tensor:
    known = [texts[k] for k in train.tolist()]
    spaces = sum(text.count(" ") for text in known) / max(1, sum(map(len, known)))
    return (encode or by_frequency(known, words if spaces > 0.05 else characters, LENGTH))(texts)
