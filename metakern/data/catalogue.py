"""The data sets that can be named on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from metakern.data.digits import digits
from metakern.data.examples import Source
from metakern.data.folder import data_dir as find_data_dir
from metakern.data.mnist import mnist

_LOADERS: dict[str, Callable[[Path | None], Source]] = {
    "digits-4v9": lambda root: digits((4, 9)),
    "digits": lambda root: digits(),
    "mnist-4v9": lambda root: mnist(root, (4, 9)),
    "mnist": lambda root: mnist(root),
}

NAMES = tuple(_LOADERS)


def load(name: str, data_dir: str | Path | None = None) -> Source:
    """The data set called `name`, read from `data_dir` or, without it, from the folder METAKERN_DATA names.

    Raises: ValueError listing the names when there is no such set; DataNotFound when its files are missing.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}; there are: {', '.join(NAMES)}")
    return _LOADERS[name](find_data_dir(data_dir))
