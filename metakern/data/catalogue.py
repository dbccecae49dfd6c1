"""The data sets that can be named on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from metakern.data.cifar10 import cifar10
from metakern.data.digits import digits
from metakern.data.examples import Source
from metakern.data.folder import data_dir as find_data_dir
from metakern.data.mnist import mnist
from metakern.data.tabular import credit_default, credit_fraud, haberman
from metakern.data.text import ag_news, ag_news_human, clue

_LOADERS: dict[str, Callable[[Path | None], Source]] = {
    "digits-4v9": lambda root: digits((4, 9)),
    "digits": lambda root: digits(),
    "mnist-4v9": lambda root: mnist(root, (4, 9)),
    "mnist": lambda root: mnist(root),
    "cifar10": cifar10,
    "ag-news": lambda root: ag_news(root),
    "ag-news-human": lambda root: ag_news_human(root),
    "cic": lambda root: clue(root, "cic"),
    "tnews": lambda root: clue(root, "tnews"),
    "credit-fraud": credit_fraud,
    "credit-default": credit_default,
    "haberman": haberman,
}

NAMES = tuple(_LOADERS)


def load(name: str, data_dir: str | Path | None = None) -> Source:
    """The data set called `name`, read from `data_dir` or, without it, from the folder METAKERN_DATA names.

    Raises: ValueError listing the names when there is no such set; DataNotFound when its files are missing.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}; there are: {', '.join(NAMES)}")
    return _LOADERS[name](find_data_dir(data_dir))
