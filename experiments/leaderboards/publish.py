"""`python -m experiments.leaderboards.publish`: the tables of this folder's page and README's, from the CSV files."""

import csv
from pathlib import Path

from experiments import tables

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
PAGE = HERE / "README.md"

BOARDS = {
    "mnist-4v9": "MNIST, 4 against 9, 99 to 1",
    "mnist-uniform": "MNIST, 40 % uniform noise",
    "mnist-background": "MNIST, 40 % background noise",
    "cifar10-uniform": "CIFAR-10, 40 % uniform noise",
    "cifar10-background": "CIFAR-10, 40 % background noise",
    "cifar10-long-tail": "CIFAR-10, long tail 100 to 1",
    "ag-news": "AG News, 20 to 1 and 40 % uniform noise",
    "ag-news-human": "AG News, labels by people, 19.7 % wrong",
    "cora": "Cora, 5 to 1",
    "credit-fraud": "credit-card fraud",
    "credit-default": "credit-card default",
}
CLASSES = {"credit-fraud": ("fraud", "genuine"), "credit-default": ("default", "paid")}
"""Of sets with a rare class that counts, which are ranked by the area under the ROC curve."""

Row = dict[str, str]


def rows_of(board: str) -> list[Row]:
    """Best first."""
    with (HERE / f"{board}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return sorted(rows, key=lambda row: -float(row["area"]) if board in CLASSES else float(row["mean"]))


def table(board: str) -> str:
    rows = rows_of(board)
    head = ["method", "test error", "difference to `uniform`"]
    if board in CLASSES:
        head = [head[0], "area under ROC", *head[1:], *(f"accuracy on {name}" for name in CLASSES[board])]
    return tables.as_table([head, *[_entries(row, board in CLASSES) for row in rows]])


def _entries(row: Row, binary: bool) -> list[str]:
    error = f"{float(row['mean']):.2f} ± {float(row['deviation']):.2f}"
    plain = row["method"] == "uniform"
    difference = "" if plain else f"{float(row['difference']):+.2f} ± {float(row['interval']):.2f}"
    if not binary:
        return [f"`{row['method']}`", error, difference]
    accuracies = [f"{float(value):.1f}" for value in row["accuracies"].split()]
    return [f"`{row['method']}`", f"{float(row['area']):.2f}", error, difference, *accuracies]


def summary() -> str:
    """A line for each data set: plain training, l2rw, and the first of the table."""
    entries = []
    for board, title in BOARDS.items():
        if not (HERE / f"{board}.csv").is_file():
            continue
        rows, area = rows_of(board), board in CLASSES
        shown = {row["method"]: f"{float(row['area' if area else 'mean']):.1f}" for row in rows}
        best = f"{shown[rows[0]['method']]} (`{rows[0]['method']}`)"
        unit = "area under ROC" if area else "error"
        entries.append([title, unit, shown["uniform"], shown["l2rw"], best, str(len(rows))])
    return tables.as_table([["data", "", "plain training", "`l2rw`", "first of the methods", "methods"], *entries])


def with_tables(text: str) -> str:
    """The text of a page with every marked table as the CSV files have it."""
    return tables.with_tables(text, lambda name: summary() if name == "summary" else table(name))


if __name__ == "__main__":
    for page in (PAGE, README):
        page.write_text(with_tables(page.read_text()))
