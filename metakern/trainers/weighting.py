"""weighting.csv: the learned weighting function of a run."""

from __future__ import annotations

import csv
from pathlib import Path

from metakern.methods.method import WeightingFunction

NAME = "weighting.csv"


def save_weighting(folder: Path, function: WeightingFunction) -> None:
    """Write weighting.csv: the quantity in the first column, a column of weights for each curve."""
    columns = [function.at.tolist(), *(weights.tolist() for weights in function.weights.values())]
    with (folder / NAME).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([function.quantity, *function.weights])
        writer.writerows([f"{value:.6g}" for value in row] for row in zip(*columns, strict=True))


def read_weighting(folder: Path) -> tuple[str, list[float], dict[str, list[float]]] | None:
    """The name of the quantity, the points, and the weights there, by curve; None if the run has no such function."""
    if not (folder / NAME).is_file():
        return None
    with (folder / NAME).open(newline="", encoding="utf-8") as file:
        (quantity, *names), *rows = csv.reader(file)
    at, *curves = ([float(value) for value in column] for column in zip(*rows, strict=True))
    return quantity, at, dict(zip(names, curves, strict=True))
