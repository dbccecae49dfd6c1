"""The table of docs/layers.md: every layer and structure of the catalogue by every engine, against float64 gradients.

python -m metakern.layer_table > docs/layers.md
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from metakern.step import l2rw_step
from metakern.testing.budget import FLOAT64_UNIT
from metakern.testing.catalogue import CASES, NETWORKS, Case
from metakern.testing.judge import judge_step

ENGINES: dict[str, dict[str, Any]] = {
    "ghost": {"engine": "ghost"},
    "ghost, two_pass": {"engine": "ghost", "memory": "two_pass"},
    "jvp": {"engine": "jvp"},
    "double_backward": {"engine": "double_backward"},
}
SIZES = ((6, 3), (3, 5))

HEADER = """# Layers and structures

Written by `python -m metakern.layer_table > docs/layers.md`; a test holds the rows against the catalogue.

Each entry of `metakern/testing/catalogue` by each engine, in float64 on a CPU, against a loop over single examples
(where examples interact: over the single losses of the whole batch). A number is the largest error found, of a dot over
|g||v| or of an entry of the weighted gradient over sum |w||g|, with n, m = 6, 3 and 3, 5; the budget is 1e-12
([numerics](numerics.md)). "refused" is an error that says why and leaves everything as it was. The last column is the
engine that `engine="auto"` takes.
"""


@dataclass(frozen=True)
class Row:
    """One entry of the catalogue: by engine the largest error, or the first words of the refusal."""

    name: str
    cells: dict[str, float | str]
    auto: str

    def __str__(self) -> str:
        cells = (f"{cell:.0e}" if isinstance(cell, float) else "refused" for cell in self.cells.values())
        return "| " + " | ".join([self.name, *cells, self.auto]) + " |"


def row(case: Case, sizes: Iterable[tuple[int, int]] = SIZES) -> Row:
    """Run one entry by every engine. Raises AssertionError for an answer over the budget."""
    cells: dict[str, float | str] = {}
    for engine, keywords in ENGINES.items():
        found = [_error(case, n, m, keywords) for n, m in sizes]
        refusals = [cell for cell in found if isinstance(cell, str)]
        cells[engine] = refusals[0] if refusals else max(cell for cell in found if isinstance(cell, float))
    setup = case.make(6, 3)
    try:
        auto = l2rw_step(setup.model, setup.batch, setup.meta_batch, loss_fn=setup.loss_fn).engine
    except NotImplementedError:
        auto = "refused"
    return Row(case.name, cells, auto)


def _error(case: Case, n: int, m: int, keywords: dict[str, Any]) -> float | str:
    setup = case.make(n, m)
    try:
        judgement = judge_step(l2rw_step, setup, **keywords)
    except NotImplementedError as refusal:
        return str(refusal)
    return max(judgement.dots_share, judgement.gradient_share) * FLOAT64_UNIT


def page(rows: Iterable[Row]) -> str:
    """The page: the table, and below it why something was refused."""
    rows = list(rows)
    lines = [HEADER, "| layer or structure | " + " | ".join(ENGINES) + " | auto |", "| --- " * (len(ENGINES) + 2) + "|"]
    lines += map(str, rows)
    lines += ["", "## Why refused", ""]
    return "\n".join([*lines, *_reasons(rows)])


def _reasons(rows: Iterable[Row]) -> Iterator[str]:
    """One line per reason, whichever shape it came with: the engines and the entries it holds for."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for each in rows:
        for engine, cell in each.cells.items():
            if isinstance(cell, str):
                engines, names = found.setdefault(re.sub(r" \(shape [^)]*\)+", "", cell), ({}, {}))
                engines[engine.partition(",")[0]] = names[each.name] = None
    for reason, (engines, names) in found.items():
        yield f"* {', '.join(names)} by {', '.join(engines)}: {reason}"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(page(row(case) for case in [*CASES, *NETWORKS]))


if __name__ == "__main__":
    main()
