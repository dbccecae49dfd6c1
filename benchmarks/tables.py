"""Tables and plots beside those of README, from the rows: meta-steps, operators, growing sizes, plans, variants."""

from collections.abc import Callable

from benchmarks.plots import THEMES, bars
from benchmarks.rows import RESULTS
from benchmarks.runs import Row, Runs, last_runs


def runs_of(suite: str) -> Runs:
    """Empty as long as the suite was not measured."""
    path = RESULTS / f"{suite}-cpu.csv"
    return last_runs(path, {"metakern"}) if path.exists() else {}


def where(runs: Runs) -> str:
    """With what and when the rows were measured."""
    rows = [run["metakern"] for run in runs.values()]
    parts = [", ".join(sorted({row[key] for row in rows})) for key in ("device", "threads", "torch", "commit")]
    dates = ", ".join(sorted({row["date"][:10] for row in rows}))
    return f"{parts[0]}, {parts[1]} threads, fp32, torch {parts[2]}, {dates}, commit {parts[3]}."


def table(suite: str, ways: dict[str, str], figures: dict[str, str]) -> Callable[[], str]:
    """A table of `figures` (heading -> column of the rows) of some ways (heading -> provider), one line per case."""

    def made() -> str:
        runs = runs_of(suite)
        if not runs:
            return "Not measured yet."
        heads = [f"{way} {figure}".strip() for way in ways for figure in figures]
        lines = [f"| case | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
        for case, run in runs.items():
            cells = [_cell(run.get(provider), column) for provider in ways.values() for column in figures.values()]
            lines.append(f"| {case} | {' | '.join(cells)} |")
        return f"Medians on {where(runs)}\n\n" + "\n".join(lines)

    return made


def _cell(row: Row | None, column: str) -> str:
    if row is None:
        return "-"
    if row["status"] != "measured":
        known = (end for end in ("stops", "over the error budget") if row["status"].startswith(end))
        return next(known, "not measured")
    value = row[column]
    if not value:
        return "-"
    low, high = row["ratio_p20"], row["ratio_p80"]
    return f"{float(value):.2f} ({float(low):.2f} - {float(high):.2f})" if column == "ratio" else f"{float(value):.3g}"


def plans() -> str:
    """Foretold and counted: operations in plain steps, peaks in MiB."""
    runs = runs_of("plan")
    if not runs:
        return "Not measured yet."
    heads = ["operations predicted", "counted"]
    heads += [
        head for name in ("plain step", "metakern", "two_pass", "by quarters") for head in (f"{name}, MiB", "counted")
    ]
    lines = [f"| case | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
    for case, run in runs.items():
        cells = [
            f"{float(run['metakern'][column]) / float(run['plain'][column]):.3f}"
            for column in ("planned_gigaflops", "gigaflops")
        ]
        for way in ("plain", "metakern", "metakern two_pass", "metakern micro_batch=n/4"):
            figures = [run.get(way, {}).get(column) for column in ("planned_megabytes", "peak_megabytes")]
            cells += [f"{float(figure):.1f}" if figure else "-" for figure in figures]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return f"Counted on {where(runs)}\n\n" + "\n".join(lines)


def compiled() -> str:
    """Compiled and not, in uncompiled plain steps; and what compiling took, in processor seconds."""
    steps = {"plain, compiled": "plain compiled", "metakern": "metakern", "metakern, compiled": "metakern compiled"}
    runs, made = runs_of("compiled"), table("compiled", steps, {"": "ratio"})()
    if not runs:
        return made
    taken = [
        f"{case} {float(run['plain compiled']['compile_seconds']):.0f} and "
        f"{float(run['metakern compiled']['compile_seconds']):.0f}"
        for case, run in runs.items()
    ]
    return f"{made}\n\nCompiling took, of the plain step and of metakern's, in processor seconds: {'; '.join(taken)}."


META_STEPS = {
    "mwnet": {"mwnet": "metakern", "compiled": "metakern compiled", "two_pass": "metakern two_pass"},
    "mlc": {
        "mlc, fused": "metakern fused",
        "fused, compiled": "metakern fused compiled",
        "mlc": "metakern",
        "compiled": "metakern compiled",
    },
    "metabalance": {"metabalance": "metakern", "central_difference": "metakern central_difference"},
}
"""Headings and ways of each step, beside its published sequence and the quickest of the other libraries."""
OTHER_LIBRARIES = ("higher", "torchopt", "betty (finite difference)")


def meta_steps() -> str:
    """A table for each step: time with its spread, and peak memory, of every way; one line per case."""
    runs = runs_of("meta-steps")
    if not runs:
        return "Not measured yet."
    return f"Medians on {where(runs)}\n\n" + "\n\n".join(_meta_table(runs, step) for step in META_STEPS)


def _meta_table(runs: Runs, step: str) -> str:
    ways = {**META_STEPS[step], "published": "double_backward (published)"}
    heads = [head for way in (*ways, "best other library") for head in (way, "memory")]
    lines = [f"| case | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
    for name, run in runs.items():
        kind, case = name.split(" ", 1)
        if kind == step:
            cells = [cell for way in ways.values() for cell in _time_and_memory(run.get(way))]
            others = [row for way in OTHER_LIBRARIES if (row := run.get(way)) and row["status"] == "measured"]
            best = min(others, key=lambda row: float(row["ratio"]), default=None)
            time, memory = _time_and_memory(best)
            cells += [f"{time}, {best['provider']}" if best else "not measured", memory]
            lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _time_and_memory(row: Row | None) -> tuple[str, str]:
    """No memory of what was not measured, or what the counter does not see into."""
    peak = row["peak_ratio"] if row else ""
    return _cell(row, "ratio"), f"{float(peak):.2f}" if peak else "-"


STEPS = {"time": "ratio", "operations": "flop_ratio", "memory": "peak_ratio"}

SECTIONS: dict[str, Callable[[], str]] = {
    "meta-steps": meta_steps,
    "ops": table(
        "ops", {"metakern": "metakern", "compiled": "composition compiled"}, {"time": "ratio", "ms": "milliseconds"}
    ),
    "scaling": table("scaling", {"": "metakern", "double backward": "double_backward (short)"}, STEPS),
    "compiled": compiled,
    "precision": table(
        "precision",
        {"metakern": "metakern", "bf16": "metakern bf16 dots"},
        {"time": "ratio", "weight moved": "weight_moved", "kept otherwise": "kept_otherwise"},
    ),
    "plan": plans,
    "real": table("real", {"": "metakern", "double backward, short": "double_backward (short)"}, STEPS),
}
"""Parts of docs/performance.md by the name in their marks."""


def filled(text: str) -> str:
    """A page with each section made again from its rows."""
    for name, made in SECTIONS.items():
        start, end = (f"<!-- {edge} of the rows of {name} -->" for edge in ("start", "end"))
        before, rest = text.split(start)
        text = f"{before}{start}\n{made()}\n{end}{rest.split(end)[1]}"
    return text


PLOTS = {
    "ops": (["metakern", "composition compiled"], "torch compositions"),
    "scaling": (["metakern", "double_backward (short)", "metakern two_pass"], "plain steps"),
}


def plots() -> dict[str, str]:
    """Name and text of each plot."""
    made = {}
    for suite, (ways, unit) in PLOTS.items():
        groups = {
            case: {way: float(run[way]["ratio"]) for way in ways if run.get(way, {}).get("ratio")}
            for case, run in runs_of(suite).items()
        }
        if groups:
            made |= {f"{suite}-cpu-{theme}.svg": bars(groups, ways, unit, theme) for theme in THEMES}
    return made
