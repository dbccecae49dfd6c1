"""The columns of a table as features: numbers as they are, words one-hot encoded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metakern.data.examples import Origin
from metakern.data.split import standardised

Row = dict[str, str]
KINDS = 100  # a column with more different words holds names or texts
LARGEST = 1e100  # the squares of larger numbers overflow


def features(rows: Sequence[Row], columns: Sequence[str], train: Tensor, origins: Sequence[Origin]) -> Tensor:
    """Float32 [n, d], standardised by the rows `train`; empty cells get the mean of their column.

    A column of words is one-hot encoded: a column of 0 and 1 for each word in the training rows. A word that occurs
    only in other rows is 0 in all of them. `origins` say where each row comes from.
    Raises: ValueError for columns that mix numbers and words, for columns of more than `KINDS` different words or of
    words that hardly recur, and for numbers whose squares overflow.
    """
    words = [name for name in columns if not all(is_number(row[name]) for row in rows)]
    _require_kinds(rows, words, origins)
    parts = [_kinds(rows, name, train) if name in words else _numbers(rows, name) for name in columns]
    return standardised(torch.cat(parts, 1), train).float()


def is_number(cell: str) -> bool:
    """Whether this cell is a number, or empty."""
    try:
        # Python reads 12_3 as a number; in a table it is a name.
        return "_" not in cell and not math.isinf(_number(cell))
    except ValueError:
        return False


def _number(cell: str) -> float:
    return float(cell) if cell.strip() else math.nan


def _numbers(rows: Sequence[Row], name: str) -> Tensor:
    values = torch.tensor([[_number(row[name])] for row in rows], dtype=torch.float64)
    if values.nan_to_num().abs().max() > LARGEST:
        raise ValueError(f"csv: the column {name!r} has numbers beyond {LARGEST:g}; leave a missing cell empty")
    return values


def _kinds(rows: Sequence[Row], name: str, train: Tensor) -> Tensor:
    cells = [row[name].strip() for row in rows]
    known = sorted({cells[k] for k in train.tolist()} - {""})
    missing = [math.nan] * len(known)
    return torch.tensor(
        [[float(cell == kind) for kind in known] if cell else missing for cell in cells], dtype=torch.float64
    ).reshape(len(rows), len(known))


def _require_kinds(rows: Sequence[Row], names: Sequence[str], origins: Sequence[Origin]) -> None:
    """Raise ValueError unless each column of words has few different words, each of which recurs."""
    complaints: dict[str, str] = {}
    for name in names:
        cells = [row[name].strip() for row in rows if row[name].strip()]
        if 2 * sum(map(is_number, cells)) >= len(cells):
            first = next(k for k, row in enumerate(rows) if not is_number(row[name]))
            place = f"row {origins[first].row} of {origins[first].file}"
            complaints[name] = f"numbers, but {rows[first][name].strip()!r} in {place}"
        elif len(set(cells)) > min(KINDS, len(cells) // 2):
            complaints[name] = f"{len(set(cells))} different words in {len(cells)} rows"
    if complaints:
        named = ", ".join(f"{name} ({why})" for name, why in complaints.items())
        raise ValueError(
            f"csv: columns that hold neither numbers nor kinds (at most {KINDS} words, each twice on average): {named};"
            " leave a missing number empty; leave out what only names a row, by "
            f"--leave-out {','.join(complaints)}; call a column of texts 'text'"
        )
