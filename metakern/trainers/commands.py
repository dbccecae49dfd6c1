"""The commands, each a function of its parsed options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from metakern.check_target import check_target
from metakern.data import NAMES, contents
from metakern.methods import METHODS, find
from metakern.methods.pages import page_of
from metakern.trainers import train
from metakern.trainers.audit_command import audit_folder, finished_audit, run_audit
from metakern.trainers.compare import Cell, CellsFailed, cell, chosen, grid, other_table, read_cells, run_missing
from metakern.trainers.config import from_options
from metakern.trainers.demo import demo_config
from metakern.trainers.episode_config import LEARNERS, EpisodeConfig
from metakern.trainers.episodes_command import run_episodes
from metakern.trainers.leaderboard import aligned, as_text, leaderboard, save
from metakern.trainers.networks import MODELS
from metakern.trainers.place import other_cell, other_run, place
from metakern.trainers.report import write_comparison, write_report
from metakern.trainers.run_folder import errors_of, finished, meta_note, read_json, read_result
from metakern.trainers.step_costs import read_costs
from metakern.trainers.step_time import step_time
from metakern.trainers.stopping import Stopped, StopSignals

Command = Callable[[argparse.Namespace], int | None]


def _stoppable(command: Callable[[argparse.Namespace, StopSignals], None]) -> Command:
    """The command; SIGINT and SIGTERM stop it after the current step, and it returns their exit status."""

    def stopping(options: argparse.Namespace) -> int:
        with StopSignals() as stop:
            try:
                command(options, stop)
            except Stopped as stopped:
                print(f"metakern: {stopped}; the same command resumes from there", file=sys.stderr)
                return stop.status
        return 0

    return stopping


@_stoppable
def train_command(options: argparse.Namespace, stop: StopSignals) -> None:
    config = from_options(options)
    find(config.method, config.set)
    found = contents(config.data)
    default, overwrite = Path("runs") / config.name(), options.overwrite
    with place(options.out, default, lambda folder: other_run(folder, config, found), overwrite=overwrite) as folder:
        if finished(folder, config, found) is None or overwrite:
            train(config, folder, stop=stop)
        else:
            print(f"metakern: {folder} already has this run; --overwrite runs it again", file=sys.stderr)
        print(_summary([folder]))
        note = meta_note(read_json(folder / "config.json"))
        if note and find(config.method).needs_meta:
            print(note)
        page = folder / "report.html"
        print(f"report: {page if page.is_file() else write_report([folder], page, data_dir=config.data_dir)}")


def _summary(folders: Sequence[Path], step_times: dict[str, str] | None = None) -> str:
    """The results of finished runs on one task."""
    configs, results = [read_json(folder / "config.json") for folder in folders], list(map(read_result, folders))
    shown = [errors_of(result).columns(configs[0]["class_names"]) for result in results]
    rows = [["method", *shown[0], "seconds"]]
    for config, result, errors in zip(configs, results, shown, strict=True):
        rows.append([config["method"], *(f"{error:.2f} %" for error in errors.values()), f"{result['seconds']:.0f}"])
    if step_times:
        rows = [[*row, step_times.get(row[0], "step, in plain steps")] for row in rows]
    return aligned(rows)


@_stoppable
def compare_command(options: argparse.Namespace, stop: StopSignals) -> None:
    methods = chosen(options.methods)
    base = from_options(options, method=methods[0], majority=options.majorities[0], seed=0)
    configs = grid(base, methods, options.majorities, options.seeds)
    found = contents(base.data)

    def held(root: Path) -> str | None:
        lost = other_cell([cell(root, config).folder for config in configs], configs, found)
        # A folder that the user names may collect the cells of several comparisons.
        return lost if lost is not None or options.out is not None else other_table(root, configs)

    with place(options.out, Path("runs/compare"), held, overwrite=options.overwrite) as root:
        try:
            _show(run_missing(root, configs, jobs=options.jobs, stop=stop), root)
        except CellsFailed as failure:
            if any(entry.result is not None for entry in failure.cells):
                _show(failure.cells, root)
            raise


def _show(cells: Sequence[Cell], root: Path, page: Path | None = None) -> None:
    """Print the table of a comparison; write it and the report."""
    entries = leaderboard(cells)
    save(entries, root / "leaderboard.csv")
    print(as_text(entries))
    print(f"table:  {root / 'leaderboard.csv'}")
    print(f"report: {write_comparison(cells, page or root / 'report.html')}")


def audit_command(options: argparse.Namespace) -> None:
    config, given = from_options(options, method="uniform"), {"top": options.top, "folds": options.folds}
    with audit_folder(config, options.out, overwrite=options.overwrite, **given) as folder:
        found = None if options.overwrite else finished_audit(config, folder, **given)
        if found is not None:
            print(f"metakern: {folder} already has this audit; --overwrite runs it again", file=sys.stderr)
        print(found or run_audit(config, folder, **given))


def episodes_command(options: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(options).items() if name not in ("command", "out")}
    print(run_episodes(EpisodeConfig(**given), options.out))


def demo_command(options: argparse.Namespace) -> None:
    base = demo_config(options.data_dir)
    print(f"{base.data} at a majority share of {base.majority:g}, with 10 clean images as the meta set")
    runs = [train(replace(base, method=method), options.out / method) for method in ("uniform", "l2rw")]
    measured = step_time(runs[1].config, runs[1].task)
    step_times = {"uniform": "1", "l2rw": f"{measured.ratio:.2f} ({measured.low:.2f} to {measured.high:.2f})"}
    folders = [run.folder for run in runs]
    report = write_report(folders, options.out / "report.html", step_times=step_times)
    print(_summary(folders, step_times))
    print(f"A plain step takes {1000 * measured.plain_seconds:.1f} ms here; in brackets, 20th and 80th percentiles.")
    print(f"report: {report}")


def report_command(options: argparse.Namespace) -> None:
    runs: list[Path] = options.runs
    if not runs:
        from metakern.report import main as print_machine_report

        print_machine_report()
        return
    cells = read_cells(runs[0]) if len(runs) == 1 else None
    if cells is not None:
        if all(entry.result is None for entry in cells):
            raise FileNotFoundError(f"{runs[0]} holds no finished run")
        _show(cells, runs[0], options.out)
        return
    around = runs[0] if len(runs) == 1 else Path(os.path.commonpath([run.absolute().parent for run in runs]))
    print(f"report: {write_report(runs, options.out or around / 'report.html', data_dir=options.data_dir)}")


def check_command(options: argparse.Namespace) -> int:
    given = {"examples": options.examples, "explained": options.explain, "allow_unused": options.allow_unused}
    return check_target(options.target, **given)


def list_command(options: argparse.Namespace) -> None:
    costs = read_costs()
    rows = [["method", "handles", "meta set", "steps", "batch", "step cost", "page", "from"]]
    for method in METHODS.values():
        cost = f"{costs[method.name]:.2f}" if method.name in costs else "-"
        row = [method.name, method.handles, "yes" if method.needs_meta else "no", str(method.steps)]
        rows.append([*row, str(method.batch_size), cost, page_of(method.name), method.source])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]) - 1)]
    numbers = 3, 4, 5
    for row in rows:
        cells = [
            text.rjust(width) if k in numbers else text.ljust(width) for k, (text, width) in enumerate(zip(row, widths))
        ]
        print("  ".join([*cells, row[-1]]))
    print("\nstep cost: in plain steps, measured at nine tenths of a run; -: not measured, or no steps.")
    print("page: docs/methods/PAGE.md")
    print("few-shot: " + ", ".join(LEARNERS) + ", run by 'metakern episodes'; docs/methods/few-shot.md")
    print("\ndata sets: " + ", ".join(NAMES))
    print("models: " + ", ".join(MODELS) + ", transformers:DIR; default: a small one")
