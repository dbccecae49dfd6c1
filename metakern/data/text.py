"""Text data sets as tokens: AG News by words, the CLUE sets by characters."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from metakern.data.examples import Examples, Source
from metakern.data.folder import find_file, read_text

Rows = tuple[list[str], list[int]]
Encode = Callable[[list[str]], Tensor]  # texts -> tokens[n, t] int64, by a tokenizer of one's own
PAD, UNKNOWN = 0, 1
AG_CLASSES = ("world", "sports", "business", "sci-tech")


def words(text: str) -> list[str]:
    """Sequences of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def characters(text: str) -> list[str]:
    """All characters except white space, for text without spaces between words."""
    return [character for character in text if not character.isspace()]


def _source(
    name: str,
    train: Rows,
    test: Rows,
    class_names: tuple[str, ...],
    split: Callable[[str], list[str]],
    length: int,
    encode: Encode | None,
) -> Source:
    """Tokens [n, t] int64 by `encode`, or by the words or characters of the training texts."""
    encode = encode or by_frequency(train[0], split, length)

    def examples(rows: Rows) -> Examples:
        return Examples(encode(rows[0]), torch.tensor(rows[1], dtype=torch.int64), torch.arange(len(rows[0])))

    return Source(name, examples(train), examples(test), class_names, readable=train[0])


def by_frequency(texts: list[str], split: Callable[[str], list[str]], length: int) -> Encode:
    """Tokens [n, length]: numbered from 2 by falling frequency in `texts`; 1 is unknown, 0 fills the end."""
    counts = Counter(token for text in texts for token in split(text))
    numbers = {token: k + 2 for k, (token, count) in enumerate(counts.most_common(20000)) if count > 1}

    def encode(texts: list[str]) -> Tensor:
        tokens = torch.full((len(texts), length), PAD)
        for k, text in enumerate(texts):
            found = [numbers.get(token, UNKNOWN) for token in split(text)[:length]]
            tokens[k, : len(found)] = torch.tensor(found, dtype=torch.int64)
        return tokens

    return encode


def _ag_rows(path: Path) -> Rows:
    rows = list(csv.reader(io.StringIO(read_text(path))))
    if rows[0][0] == "label":
        column = rows[0].index("text")
        return [row[column] for row in rows[1:]], [int(row[0]) for row in rows[1:]]
    return [" ".join(row[1:]) for row in rows], [int(row[0]) - 1 for row in rows]


def _ag_file(
    root: Path | None, *names: str, form: str = "CSV without header: class 1 to 4, title, description"
) -> Path:
    published = "https://github.com/mhjabreel/CharCnn_Keras/tree/master/data/ag_news_csv"
    return find_file(root, ("ag_news", "ag_news_csv", "."), names, data="AG News", form=form, published=published)


def ag_news(root: Path | None, *, length: int = 64, encode: Encode | None = None) -> Source:
    """News by topic: world, sports, business, science and technology; words, int64 [n, length].

    Reads train.csv and test.csv as published (class, title, description; no header), plain or gzip; alternatively, for
    training, `train_pool.csv.gz`, a part of it with the header label, ..., text.
    Raises: DataNotFound if one is missing.
    Source: Zhang, Zhao, LeCun, "Character-level Convolutional Networks for Text Classification", NIPS 2015.
    """

    train = _ag_rows(_ag_file(root, "train.csv.gz", "train.csv", "train_pool.csv.gz"))
    test = _ag_rows(_ag_file(root, "test.csv.gz", "test.csv"))
    return _source("ag-news", train, test, AG_CLASSES, words, length, encode)


def ag_news_human(root: Path | None, *, length: int = 64, encode: Encode | None = None) -> Source:
    """The training texts that a crowd-worker labelled: that label to train on, and the true one for evaluation.

    Reads `train_pool.csv.gz`: a header with label, human_label and text; human_label is -1 if there is none.
    Source: "NoisyAG-News: A Benchmark for Instance-Dependent Label Noise in Text Classification", 2024.
    """
    path = _ag_file(root, "train_pool.csv.gz", form="CSV with the header label, human_label, ..., text")
    rows = [row for row in csv.DictReader(io.StringIO(read_text(path))) if row["human_label"] != "-1"]
    train = [row["text"] for row in rows], [int(row["human_label"]) for row in rows]
    test = _ag_rows(_ag_file(root, "test.csv.gz", "test.csv"))
    truth = torch.tensor([int(row["label"]) for row in rows])
    source = _source("ag-news-human", train, test, AG_CLASSES, words, length, encode)
    return replace(source, clean_targets=truth)


def clue(
    root: Path | None,
    name: str,
    *,
    train: tuple[str, ...] = ("train",),
    test: str = "test_public",
    length: int = 64,
    smallest: int = 1,
    encode: Encode | None = None,
) -> Source:
    """A DataCLUE text set, "cic", "tnews" or "iflytek"; characters, int64 [n, length].

    Classes with fewer than `smallest` training texts are left out, because they could not be in both the meta set and
    the training set. Reads `{name}_{part}.jsonl.gz` for all parts of `train` in order, and for `test`: one JSON object
    per line, with label and text. Texts of the part "dev" that also occur in the training set are removed from it;
    other parts contain no such texts.
    Raises: DataNotFound if one is missing.
    Source: Xu et al., "DataCLUE: A Benchmark Suite for Data-centric NLP", 2021.
    """

    def objects(part: str) -> list[dict[str, str | int]]:
        stem = f"{name}_{part}.jsonl"
        form = "JSON lines, plain or gzip: an object a line with label (from 0), label_name and text"
        published = "https://github.com/CLUEbenchmark/DataCLUE"
        path = find_file(root, ("clue", "."), (stem + ".gz", stem), data=name.upper(), form=form, published=published)
        # At line feeds alone: a text may hold the other ends of lines that Unicode knows.
        return [json.loads(line) for line in read_text(path).split("\n") if line.strip()]

    training = _first_copies([row for part in train for row in objects(part)])
    testing = _first_copies(objects(test))
    if test == "dev":
        known = {str(row["text"]) for row in training}
        testing = [row for row in testing if str(row["text"]) not in known]
    counts = Counter(int(row["label"]) for row in training)
    labels = sorted(label for label, count in counts.items() if count >= smallest)
    targets = {label: k for k, label in enumerate(labels)}
    names = {int(row["label"]): str(row["label_name"]) for row in training}

    def rows(found: list[dict[str, str | int]]) -> Rows:
        kept = [row for row in found if int(row["label"]) in targets]
        return [str(row["text"]) for row in kept], [targets[int(row["label"])] for row in kept]

    called = "-".join([name, *train[1:], *([test] if test == "dev" else [])])
    class_names = tuple(names[label] for label in labels)
    return _source(called, rows(training), rows(testing), class_names, characters, length, encode)


def _first_copies(rows: list[dict[str, str | int]]) -> list[dict[str, str | int]]:
    """The first of several copies of a text: copies must not be in both the meta set and the training set."""
    first: dict[str, dict[str, str | int]] = {}
    for row in rows:
        first.setdefault(str(row["text"]), row)
    return list(first.values())
