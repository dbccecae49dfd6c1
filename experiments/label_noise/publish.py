"""`python -m experiments.label_noise.publish`: tables and figure of this folder's page, from `curves.csv`."""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from experiments import tables

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
GUIDE = HERE.parents[1] / "docs" / "guide.md"
METHODS = ("uniform", "random", "uniform-es", "uniform-ft", "clean-only", "glc", "mw-net", "l2rw")
DRAWN = {"uniform": "#8c959f", "clean-only": "#bf8700", "mw-net": "#1a7f37", "l2rw": "#0969da"}
INK = {"light": "#1f2328", "dark": "#f0f6fc"}
METADATA = ("Date", "Creator", "Format", "Type")  # left out of the figures
SET_OF_CURVES = "5"  # clean examples of each class

Curves = dict[tuple[str, str], dict[int, list[float]]]
"""Test errors of the seeds by step, by method and number of clean examples of each class."""


def curves() -> Curves:
    found: Curves = defaultdict(lambda: defaultdict(list))
    with (HERE / "curves.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["method"], row["meta_per_class"]][int(row["step"])].append(float(row["test_error"]))
    return found


def spread(errors: list[float]) -> str:
    return f"{statistics.mean(errors):.1f} ± {statistics.stdev(errors):.1f} ({len(errors)})"


def by_method() -> str:
    """Test error on the way and at the end."""
    found = curves()
    steps = (200, 400, 1000, 2000, 3000)
    lines = [["method", *(f"step {step}" for step in steps)]]
    for method in METHODS:
        errors = found.get((method, SET_OF_CURVES))
        if errors:
            lines.append([f"`{method}`", *(spread(errors[step]) if step in errors else "-" for step in steps)])
    return tables.as_table(lines)


def by_clean_set() -> str:
    """Test error by the number of clean examples of each class."""
    found, steps = curves(), (400, 1000, 3000)
    sizes = sorted({size for _, size in found}, key=int)
    lines = [["clean examples of each class", "`clean-only`", *(f"`l2rw`, step {step}" for step in steps)]]
    for size in sizes:
        clean, ours = found["clean-only", size], found["l2rw", size]
        if clean and ours:
            lines.append([size, spread(clean[3000]), *(spread(ours[step]) for step in steps)])
    return tables.as_table(lines)


TABLES = {"methods": by_method, "clean set": by_clean_set}


def with_tables(text: str) -> str:
    """The text of a page with every marked table as `curves.csv` has it."""
    return tables.with_tables(text, lambda name: TABLES[name]())


def draw(theme: str) -> None:
    """Mean test error over the steps; the band is from the lowest to the highest seed."""
    ink = INK[theme]
    style = {"svg.fonttype": "none", "svg.hashsalt": "label noise", "font.family": "sans-serif", "text.color": ink}
    style |= {f"{part}.color": ink for part in ("xtick", "ytick")} | {"axes.labelcolor": ink, "axes.edgecolor": ink}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 3), layout="constrained")
        axis = figure.subplots()
        for method, colour in DRAWN.items():
            errors = curves()[method, SET_OF_CURVES]
            steps = sorted(errors)
            axis.plot(steps, [statistics.mean(errors[step]) for step in steps], color=colour, label=method)
            low, high = ([pick(errors[step]) for step in steps] for pick in (min, max))
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(xlabel="step", ylabel="test error, %", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, ncols=len(DRAWN))
        figure.savefig(HERE / f"curves-{theme}.svg", transparent=True, metadata=dict.fromkeys(METADATA))


if __name__ == "__main__":
    for page in (PAGE, GUIDE):
        page.write_text(with_tables(page.read_text()))
    for theme in INK:
        draw(theme)
