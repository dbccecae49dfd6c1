"""Pickled arrays, read without calling anything else that a pickle may name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

_CALLED = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.empty(0).__reduce__()[0]}
_MODULES = "numpy", "numpy.core.multiarray", "numpy._core.multiarray"


class _OfArrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module not in _MODULES or name not in _CALLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an array")
        return _CALLED[name]


def read_pickled(path: Path) -> Any:
    """The arrays, numbers, texts, lists and dicts of a pickle; a text that Python 2 has written is bytes.

    Raises: ValueError naming the file where it is no whole pickle or asks for anything else.
    """
    try:
        with path.open("rb") as file:
            return _OfArrays(file, encoding="bytes").load()
    except Exception as error:  # what is no pickle can raise anything
        raise ValueError(f"{path} cannot be read as a pickle of arrays: {error}") from error
