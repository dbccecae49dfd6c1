"""`python -m experiments.metabalance_credit.publish [OUT]`: this page's tables and `expected.csv`, from `runs.csv`.

With OUT, the folder of the two comparisons, `runs.csv` is first made anew from their finished runs.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from experiments import tables
from metakern.methods.metabalance import SAMPLERS

HERE = Path(__file__).parent
PAGE, RUNS = HERE / "README.md", HERE / "runs.csv"
SETS = {"credit-fraud": "fraud", "credit-default": "default"}
FIGURES = ("roc_area", "test_error", "balanced_error")
METHODS = ("uniform", "random", "resample", *(name for name in SAMPLERS if name != "raw"))
METHODS += ("metabalance", "metabalance-as-shipped")
GIVEN = "raw-smote"
"""The pools of the method called `metabalance`."""

Runs = dict[tuple[str, str], list[dict[str, str]]]
"""The seeds' runs by data set and method."""


def collect(out: Path) -> None:
    rows = []
    for path in sorted(out.glob("*/cells/*/result.json")):
        result = json.loads(path.read_text())
        named = [str(result["identity"][key]) for key in ("data", "majority", "method", "seed")]
        rows.append([*named, *(f"{result[figure]:.6g}" for figure in FIGURES)])
    with RUNS.open("w", newline="") as file:
        csv.writer(file).writerows([["data", "majority", "method", "seed", *FIGURES], *rows])


def runs() -> Runs:
    found: Runs = defaultdict(list)
    with RUNS.open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["data"], row["method"]].append(row)
    return found


def values(rows: list[dict[str, str]], figure: str) -> list[float]:
    return [float(row[figure]) for row in rows]


def spread(rows: list[dict[str, str]], figure: str, digits: int = 2) -> str:
    found = values(rows, figure)
    return f"{statistics.mean(found):.{digits}f} ± {statistics.stdev(found):.{digits}f}"


def of_methods() -> str:
    """Every method but the pairs of pools."""
    found = runs()
    lines = [["method", *(f"{name}: {what}" for name in SETS.values() for what in ("area", "mean error of classes"))]]
    for method in METHODS:
        rows = [found[data, method] for data in SETS]
        cells = [cell for each in rows for cell in (spread(each, "roc_area"), spread(each, "balanced_error", 1))]
        lines.append([f"`{method}`", *cells])
    return tables.as_table(lines)


def of_pools(data: str, figure: str) -> str:
    """Means by inner pool (rows) and outer pool (columns)."""
    found = runs()
    lines = [["inner \\ outer", *SAMPLERS]]
    for inner in SAMPLERS:
        cells = []
        for outer in SAMPLERS:
            pools = f"{inner}-{outer}"
            rows = found[data, "metabalance" if pools == GIVEN else f"metabalance-{pools}"]
            cells.append(f"{statistics.mean(values(rows, figure)):.1f}")
        lines.append([f"`{inner}`", *cells])
    return tables.as_table(lines)


def with_tables(text: str) -> str:
    """The text of the page with every marked table as `runs.csv` has it."""

    def table(name: str) -> str:
        data, _, figure = name.partition(" ")
        return of_pools(data, figure) if figure else of_methods()

    return tables.with_tables(text, table)


def write_expected() -> None:
    found = runs()
    lines = [["data", "method", "seeds", *(f"{figure}_{what}" for figure in FIGURES for what in ("mean", "deviation"))]]
    for (data, method), rows in found.items():
        cells = []
        for figure in FIGURES:
            each = values(rows, figure)
            cells += [f"{statistics.mean(each):.6g}", f"{statistics.stdev(each):.6g}"]
        lines.append([data, method, str(len(rows)), *cells])
    with (HERE / "expected.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    write_expected()
    PAGE.write_text(with_tables(PAGE.read_text()))
