"""`python -m benchmarks.publish`: the tables of README and docs, and the plots, from the committed rows alone."""

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks import tables
from benchmarks.plots import THEMES, bars
from benchmarks.rows import RESULTS
from benchmarks.runs import Run, Runs, last_runs

README = Path(__file__).parents[1] / "README.md"
PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.md"
START, END = "<!-- rows: python -m benchmarks.publish -->", "<!-- end of rows -->"

TITLES = {
    "mlp-1024-32": "MLP 4 x 1024, 1024 / 32",
    "mlp-256-16": "MLP 4 x 1024, 256 / 16",
    "conv-128-10": "conv net 32x32, 128 / 10",
    "conv-64-16": "conv net 32x32, 64 / 16",
    "conv-bn-64-16": "conv net 32x32 with BatchNorm, 64 / 16",
    "sdpa-64-4": "transformer, fused attention, 64 / 4",
    "sdpa-32-8": "transformer, fused attention, 32 / 8",
    "transformer-64-4": "transformer, composed attention, 64 / 4",
    "transformer-32-8": "transformer, composed attention, 32 / 8",
    "lenet-100-10": "LeNet 28x28, 100 / 10",
}
COLUMNS = {
    "metakern": ("metakern",),
    "compiled": ("metakern compiled",),
    "double backward, as published": ("double_backward (published)", "double_backward (published, math)"),
    "double backward, short": ("double_backward (short)", "double_backward", "double_backward (short, math)"),
    "jvp": ("jvp", "jvp (math)"),
    "vmap": ("vmap",),
    "best other library": ("opacus", "backpack", "higher", "torchopt", "betty (finite difference)"),
}
"""Ways of a column; "(math)" is what a user of fused attention falls back to where the way itself stops."""

PEERED = {"metakern", "vmap"}
"""Ways without which a run of the steps was not one of metakern and its peers."""

Table = Callable[[Runs], str]


def table(runs: Runs) -> str:
    """Median plain steps, one line per case; the smallest of a line is bold."""
    columns = [name for name, ways in COLUMNS.items() if any(way in run for run in runs.values() for way in ways)]
    lines = [f"| case (train / meta batch) | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for case, title in TITLES.items():
        if case not in runs:
            lines.append(f"| {title} |{' not measured |' * len(columns)}")
            continue
        cells = [_cell(runs[case], COLUMNS[column]) for column in columns]
        best = min((_ratio(cell) for cell in cells), default=None)
        lines.append(f"| {title} | {' | '.join(f'**{c}**' if _ratio(c) == best else c for c in cells)} |")
    return "\n".join(lines)


def _ratio(cell: str) -> float:
    found = re.match(r"[\d.]+(?=$| )", cell)
    return float(found[0]) if found and "GB" not in cell else float("inf")


def _cell(run: Run, ways: tuple[str, ...]) -> str:
    measured = [row for way in ways if (row := run.get(way)) and row["status"] == "measured"]
    if measured:
        row = min(measured, key=lambda row: float(row["ratio"]))
        ratio = float(row["ratio"])
        cell = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}"
        return f"{cell} (math)" if "math" in row["provider"] else cell
    for way in ways:
        if way in run:
            size = re.search(r"[\d.]+ GB", run[way]["status"])
            return size[0] if size else "stops" if run[way]["status"].startswith("stops") else "not measured"
    return "not measured"


def caption(runs: Runs) -> str:
    """Where, with what and when the rows were measured."""
    rows = [run["metakern"] for run in runs.values()]
    devices, times, commits = (sorted({row[key] for row in rows}) for key in ("device", "date", "commit"))
    dates = sorted({time[:10] for time in times})
    kept = statistics.median(float(row["kept"]) for row in rows)
    return (
        f"Cost of one re-weighted step, in plain steps of the same model and batch, interleaved in one run: medians on "
        f"{', '.join(devices)},\n{rows[0]['threads']} threads, fp32, {100 * kept:.0f} % of the batch kept, torch "
        f"{rows[0]['torch']}, {', '.join(dates)}, commit {', '.join(commits)}."
    )


def floors(runs: Runs) -> str:
    """Beside metakern's counted operations and its time, the passes that its form needs: see docs/performance.md."""
    lines = ["| case | form | floor | operations counted | spread of the time | time |", "|" + " --- |" * 6]
    for case in (case for case in TITLES if case in runs):
        row = runs[case]["metakern"]
        sizes = dict(part.split("=") for part in row["shapes"].split())
        form = "forward mode" if row["engine"] == "jvp" else "pairs" if case.startswith("mlp") else "direction"
        passes = {"forward mode": 5, "pairs": 2 + float(row["kept"]), "direction": 3 + float(row["kept"])}[form]
        floor = passes / 3 + int(sizes["m"]) / int(sizes["n"])
        figures = [floor, *(float(row[key]) for key in ("flop_ratio", "ratio_p20", "ratio_p80", "ratio"))]
        least, counted, low, high, time = (f"{f:.2f}" for f in figures)
        lines.append(f"| {TITLES[case]} | {form} | {least} | {counted} | {low} - {high} | {time} |")
    return "\n".join(lines)


MEMORY = {
    "metakern": ("metakern",),
    "two_pass": ("metakern two_pass",),
    "micro_batch=n/4": ("metakern micro_batch=n/4",),
    **{name: ways for name, ways in COLUMNS.items() if name not in ("metakern", "compiled", "best other library")},
}


def memory(runs: Runs) -> str:
    """Peak memory in that of a plain step, one line per case."""
    lines = [f"| peak memory | {' | '.join(MEMORY)} |", "|" + " --- |" * (len(MEMORY) + 1)]
    for case in (case for case in TITLES if case in runs):
        cells = []
        for ways in MEMORY.values():
            found = [row for way in ways if (row := runs[case].get(way)) and row["status"] == "measured"]
            cells.append(f"{float(found[0]['peak_ratio']):.2f}" if found else "-")
        lines.append(f"| {TITLES[case]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def floors_and_memory(runs: Runs) -> str:
    """Both tables of docs/performance.md."""
    return f"{floors(runs)}\n\n{memory(runs)}"


def published(text: str, table: Table, rows: Path = RESULTS / "steps-cpu.csv", threads: str = "2") -> str:
    """A page with the part between its marks made again from the rows."""
    runs = last_runs(rows, PEERED, threads)
    begin, end = text.index(START), text.index(END)
    return f"{text[:begin]}{START}\n{caption(runs)}\n\n{table(runs)}\n\n{text[end:]}"


def pages() -> dict[Path, str]:
    """The text of each page, made again."""
    performance = published(PERFORMANCE.read_text(), floors_and_memory)
    return {README: published(README.read_text(), table), PERFORMANCE: tables.filled(performance)}


def plot_files(rows: Path = RESULTS / "steps-cpu.csv", threads: str = "2") -> dict[str, str]:
    """Name and text of each plot."""
    runs = last_runs(rows, PEERED, threads)
    groups = {
        title: {
            column: _ratio(cell.removesuffix(" (math)"))
            for column, ways in COLUMNS.items()
            if _ratio(cell := _cell(runs[case], ways)) < float("inf")
        }
        for case, title in TITLES.items()
        if case in runs
    }
    steps = {f"steps-cpu-{theme}.svg": bars(groups, list(COLUMNS), "plain steps", theme) for theme in THEMES}
    return steps | tables.plots()


def main() -> None:
    argparse.ArgumentParser(description="the tables of README and docs, and the plots, from the rows").parse_args()
    made, plots = pages(), plot_files()
    for page, text in made.items():
        page.write_text(text)
    for name, text in plots.items():
        (RESULTS / name).write_text(text)
    print("written:", ", ".join(page.name for page in made), "and", ", ".join(plots))


if __name__ == "__main__":
    main()
