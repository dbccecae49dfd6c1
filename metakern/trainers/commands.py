"""The commands of the command line, each a function of its parsed options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metakern.check_target import check_target
from metakern.data import NAMES, contents
from metakern.methods import METHODS, find
from metakern.methods.pages import page_of
from metakern.trainers import train
from metakern.trainers.audit_command import UNUSED, run_audit
from metakern.trainers.compare import chosen, grid, run_missing
from metakern.trainers.config import add_options, from_options
from metakern.trainers.demo import demo_config
from metakern.trainers.episode_config import LEARNERS, EpisodeConfig
from metakern.trainers.episodes_command import run_episodes
from metakern.trainers.leaderboard import aligned, as_text, leaderboard, save
from metakern.trainers.loop import Run
from metakern.trainers.networks import MODELS
from metakern.trainers.report import write_comparison, write_report
from metakern.trainers.run_folder import finished
from metakern.trainers.step_costs import read_costs
from metakern.trainers.step_time import step_time


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="metakern", description="Train with re-weighted examples.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("train", help="train with one method and write a report")
    one.add_argument("method", metavar="METHOD", help="see 'metakern list'")
    one.add_argument("--out", type=Path, metavar="X", help="folder of the run (default: runs/DATA-BIAS-METHOD-SEED)")
    add_options(one)
    one.set_defaults(command=_train)

    many = commands.add_parser("compare", help="run methods x majority shares x seeds and write a leaderboard")
    many.add_argument(
        "--methods",
        type=_words,
        default=list(METHODS),
        metavar="A,B",
        help="default: all; noise or imbalance: those for it",
    )
    many.add_argument("--majority", dest="majorities", type=_shares, default=[None], metavar="P,Q", help="shares")
    many.add_argument("--seeds", type=_seeds, default=[0, 1, 2], metavar="A-B", help="seeds, as 0-4 or 0,2,5")
    many.add_argument("--jobs", type=int, default=1, metavar="X", help="runs at a time (default: 1)")
    many.add_argument(
        "--out", type=Path, default=Path("runs/compare"), metavar="X", help="folder (default: %(default)s)"
    )
    add_options(many, leave_out=("majority", "seed"))
    many.set_defaults(command=_compare)

    _add_audit(commands)
    _add_episodes(commands)

    demo = commands.add_parser("demo", help="plain training beside l2rw, in a few minutes")
    demo.add_argument(
        "--data-dir", metavar="X", help="folder of data sets (default: METAKERN_DATA); MNIST is used if there"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="X", help="folder (default: %(default)s)")
    demo.set_defaults(command=_demo)

    report = commands.add_parser("report", help="rebuild the report of runs; without runs: what this machine can run")
    report.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of finished runs")
    report.add_argument("--data-dir", metavar="X", help="folder of data sets")
    report.add_argument(
        "--out", type=Path, metavar="X", help="the file to write (default: report.html in the first run)"
    )
    report.set_defaults(command=_report)

    _add_check(commands)
    commands.add_parser("list", help="the methods and data sets").set_defaults(command=_list)
    return root


def _add_check(commands: Any) -> None:
    checked = commands.add_parser("check", help="is metakern exact for your model? exit status 0 if so, 1 if not")
    checked.add_argument("target", metavar="MODULE:FUNCTION", help="returns (model, batch, meta_batch[, loss_fn])")
    checked.add_argument("--examples", type=int, default=8, metavar="X", help="compared (default: %(default)s)")
    checked.add_argument("--explain", action="store_true", help="which rule and form each layer takes, and its cost")
    checked.add_argument("--allow-unused", action="store_true", help="parameters that take no part are no error")
    checked.set_defaults(command=_check)


def _add_audit(commands: Any) -> None:
    look = commands.add_parser("audit", help="train once and rank the training examples by the harm they did")
    look.add_argument("--top", type=int, default=60, metavar="X", help="examples on the page (default: 60)")
    look.add_argument("--folds", type=int, default=5, metavar="X", help="runs for cleanlab's ranking; 0: without it")
    look.add_argument("--out", type=Path, default=Path("runs/audit"), metavar="X", help="folder (default: %(default)s)")
    add_options(look, leave_out=UNUSED)
    look.set_defaults(command=_audit)


def _add_episodes(commands: Any) -> None:
    few = commands.add_parser("episodes", help="few-shot learners on support sets that are not balanced")
    few.add_argument(
        "--out", type=Path, default=Path("runs/episodes"), metavar="X", help="folder (default: %(default)s)"
    )
    add_options(few, of=EpisodeConfig)
    few.set_defaults(command=_episodes)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _shares(text: str) -> list[float | None]:
    try:
        shares: list[float | None] = [float(word) for word in _words(text)]
    except ValueError:
        shares = []
    if not shares:
        raise argparse.ArgumentTypeError(f"takes shares, as in 0.9,0.995, got {text!r}")
    return shares


def _seeds(text: str) -> list[int]:
    seeds: list[int] = []
    try:
        for word in _words(text):
            first, _, last = word.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        seeds = []
    if not seeds:
        raise argparse.ArgumentTypeError(f"takes seeds, as in 0-4 or 0,2,5, got {text!r}")
    return list(dict.fromkeys(seeds))


def _train(options: argparse.Namespace) -> None:
    config = from_options(options)
    find(config.method, config.set)
    folder = options.out or Path("runs") / config.name()
    if (folder / "result.json").is_file() and finished(folder, config, contents(config.data)) is None:
        print(f"metakern: {folder} held a finished run of other settings, which this one replaces", file=sys.stderr)
    run = train(config, folder)
    print(_summary([run]))
    print(f"report: {write_report([run.folder], run.folder / 'report.html', data_dir=config.data_dir)}")


def _summary(runs: Sequence[Run], step_times: dict[str, str] | None = None) -> str:
    shown = [run.errors.columns(run.task.class_names) for run in runs]
    rows = [["method", *shown[0], "seconds"]]
    for run, errors in zip(runs, shown, strict=True):
        rows.append([run.config.method, *(f"{error:.2f} %" for error in errors.values()), f"{run.seconds:.0f}"])
    if step_times:
        rows = [[*row, step_times.get(row[0], "step, in plain steps")] for row in rows]
    return aligned(rows)


def _compare(options: argparse.Namespace) -> None:
    methods = chosen(options.methods)
    base = from_options(options, method=methods[0], majority=options.majorities[0], seed=0)
    configs = grid(base, methods, options.majorities, options.seeds)
    cells = run_missing(options.out, configs, jobs=options.jobs)
    entries = leaderboard(cells)
    save(entries, options.out / "leaderboard.csv")
    print(as_text(entries))
    print(f"table:  {options.out / 'leaderboard.csv'}")
    print(f"report: {write_comparison(cells, options.out / 'report.html')}")


def _audit(options: argparse.Namespace) -> None:
    print(run_audit(from_options(options, method="uniform"), options.out, top=options.top, folds=options.folds))


def _episodes(options: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(options).items() if name not in ("command", "out")}
    print(run_episodes(EpisodeConfig(**given), options.out))


def _demo(options: argparse.Namespace) -> None:
    base = demo_config(options.data_dir)
    print(f"{base.data} at a majority share of {base.majority:g}, with 10 clean images as the meta set")
    runs = [train(replace(base, method=method), options.out / method) for method in ("uniform", "l2rw")]
    measured = step_time(runs[1].config, runs[1].task)
    step_times = {"uniform": "1", "l2rw": f"{measured.ratio:.2f} ({measured.low:.2f} to {measured.high:.2f})"}
    report = write_report([run.folder for run in runs], options.out / "report.html", step_times=step_times)
    print(_summary(runs, step_times))
    print(f"A plain step takes {1000 * measured.plain_seconds:.1f} ms here; in brackets the 20th and 80th percentile.")
    print(f"report: {report}")


def _report(options: argparse.Namespace) -> None:
    if options.runs:
        path = options.out or options.runs[0] / "report.html"
        print(f"report: {write_report(options.runs, path, data_dir=options.data_dir)}")
    else:
        from metakern.report import main as print_machine_report

        print_machine_report()


def _check(options: argparse.Namespace) -> int:
    given = {"examples": options.examples, "explained": options.explain, "allow_unused": options.allow_unused}
    return check_target(options.target, **given)


def _list(options: argparse.Namespace) -> None:
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
    print("few-shot: " + ", ".join(LEARNERS) + ", each by 'metakern episodes'; docs/methods/few-shot.md")
    print("\ndata sets: " + ", ".join(NAMES))
    print("models: " + ", ".join(MODELS) + ", transformers:DIR; a small one where none is named")
