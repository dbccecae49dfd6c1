"""The data sets that can be named on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from metakern.data.cifar10 import cifar10
from metakern.data.cifar100 import cifar100
from metakern.data.contents import contents
from metakern.data.csv_file import csv_file, table_name
from metakern.data.digits import digits
from metakern.data.examples import Source
from metakern.data.folder import data_dir as find_data_dir
from metakern.data.image_folder import image_folder
from metakern.data.mnist import mnist
from metakern.data.nodes import graph_source
from metakern.data.tabular import credit_default, credit_fraud, haberman
from metakern.data.text import Encode, ag_news, ag_news_human, clue

_LOADERS: dict[str, Callable[[Path | None], Source]] = {
    "digits-4v9": lambda root: digits((4, 9)),
    "digits": lambda root: digits(),
    "mnist-4v9": lambda root: mnist(root, (4, 9)),
    "mnist": lambda root: mnist(root),
    "cifar10": cifar10,
    "cifar100": cifar100,
    "credit-fraud": credit_fraud,
    "credit-fraud-all": lambda root: credit_fraud(root, first_hours=True),
    "credit-default": credit_default,
    "haberman": haberman,
    "cora": lambda root: graph_source("cora", root),
    "citeseer": lambda root: graph_source("citeseer", root),
}

_TEXTS: dict[str, Callable[[Path | None, Encode | None], Source]] = {
    "ag-news": lambda root, encode: ag_news(root, encode=encode),
    "ag-news-human": lambda root, encode: ag_news_human(root, encode=encode),
    "cic": lambda root, encode: clue(root, "cic", encode=encode),
    "cic-dev": lambda root, encode: clue(root, "cic", test="dev", encode=encode),
    "tnews": lambda root, encode: clue(root, "tnews", encode=encode),
    "tnews-dev": lambda root, encode: clue(root, "tnews", test="dev", encode=encode),
    "tnews-extra": lambda root, encode: clue(root, "tnews", train=("train", "extra"), encode=encode),
    "iflytek": lambda root, encode: clue(root, "iflytek", smallest=2, encode=encode),
}

NAMES = (*_LOADERS, *_TEXTS)


def is_own(name: str) -> bool:
    """Whether `name` stands for data of the user's own, "images:DIR" or "csv:FILE"."""
    return name.startswith(("images:", "csv:"))


def short_name(name: str) -> str:
    """A name that can be part of a folder's name; for the user's own data, the kind and the last part of the path."""
    kind, _, path = name.partition(":")
    return f"{kind}-{table_name(path.split(',')[0])}" if is_own(name) else name


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    encode: Encode | None = None,
    label: str | None = None,
    group: str | None = None,
    leave_out: str | None = None,
) -> Source:
    """The data set called `name`, read from `data_dir` or, without it, from the folder that METAKERN_DATA names.

    `encode` maps texts to tokens[n, t] int64; without it, tokens are words or characters. Your own data are called
    "images:DIR" (see `image_folder`) or "csv:FILE" (see `csv_file`), where `label` names the column of classes, `group`
    that of groups of classes, and `leave_out`, as in "a,b", columns to ignore.
    Raises: ValueError with the known names if there is no such data set, and for `encode` or column names if the data
    set does not take them; DataNotFound if its files are missing.
    """
    kind, _, path = name.partition(":")
    if kind == "csv":
        read = contents(name)
        left_out = [column.strip() for column in (leave_out or "").split(",") if column.strip()]
        return replace(csv_file(path, label, encode, group, left_out), contents=read)
    for option, column in (("--label", label), ("--group", group), ("--leave-out", leave_out)):
        if column is not None:
            raise ValueError(f"{option} names a column of --data csv:FILE, got {name!r}")
    if name in _TEXTS:
        return _TEXTS[name](find_data_dir(data_dir), encode)
    if encode is not None:
        raise ValueError(f"a tokenizer needs a set of texts ({', '.join(_TEXTS)}), got {name!r}")
    if kind == "images":
        read = contents(name)
        return replace(image_folder(path), contents=read)
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}; there are: {', '.join(NAMES)}, images:DIR, csv:FILE")
    return _LOADERS[name](find_data_dir(data_dir))
