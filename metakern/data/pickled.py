"""Pickled arrays, read without calling anything else that a pickle may name."""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np


class SparseRows:
    """What a pickled CSR matrix of SciPy holds: shape, data, indices and indptr; SciPy is not needed."""

    def __setstate__(self, state: dict[Any, Any]) -> None:
        known = {key.decode() if isinstance(key, bytes) else key: value for key, value in state.items()}
        self.shape = tuple(map(int, known["_shape"]))
        self.data, self.indices, self.indptr = (np.asarray(known[key]) for key in ("data", "indices", "indptr"))


_ARRAYS = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.empty(0).__reduce__()[0]}
_NUMPY = "numpy", "numpy.core.multiarray", "numpy._core.multiarray"
_CALLED = {
    **{(module, name): called for module in _NUMPY for name, called in _ARRAYS.items()},
    **{(f"scipy.sparse.{module}", "csr_matrix"): SparseRows for module in ("csr", "_csr")},
    **{(module, "list"): list for module in ("builtins", "__builtin__")},
    ("collections", "defaultdict"): defaultdict,
}


class _OfArrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CALLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an array")
        return _CALLED[module, name]


def read_pickled(path: Path) -> Any:
    """The arrays, numbers, texts, lists, dicts and CSR matrices of a pickle; texts written by Python 2 are bytes.

    Raises: ValueError naming the file if it is not a complete pickle, or names anything else.
    """
    try:
        with path.open("rb") as file:
            return _OfArrays(file, encoding="bytes").load()
    except Exception as error:  # what is no pickle can raise anything
        raise ValueError(f"{path} cannot be read as a pickle of arrays: {error}") from error
