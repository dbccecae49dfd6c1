"""The options of every command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

import metakern
from metakern.methods import METHODS
from metakern.trainers import commands
from metakern.trainers.audit_command import UNUSED
from metakern.trainers.config import add_options
from metakern.trainers.episode_config import EpisodeConfig


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, without a hundred lines of usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; '{self.prog} --help' lists the options", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """`metakern COMMAND ...`; `command` of the parsed options is the function of the command."""
    root = _Parser(prog="metakern", description="Train with re-weighted examples.")
    root.add_argument("--version", action="version", version=f"metakern {metakern.__version__}")
    added = root.add_subparsers(required=True, metavar="COMMAND")
    _add_train(added)
    _add_compare(added)
    _add_audit(added)
    _add_episodes(added)
    _add_demo(added)
    _add_report(added)
    _add_check(added)
    added.add_parser("list", help="list methods and data sets").set_defaults(command=commands.list_command)
    return root


def _add_train(added: Any) -> None:
    one = added.add_parser("train", help="train with one method and write a report")
    one.add_argument("method", metavar="METHOD", help="see 'metakern list'")
    _add_out(one, "runs/DATA-BIAS-METHOD-SEED", "replace the run in the folder")
    add_options(one)
    one.set_defaults(command=commands.train_command)


def _add_compare(added: Any) -> None:
    many = added.add_parser("compare", help="run methods x majority shares x seeds and write a leaderboard")
    meaning = "default: all; noise or imbalance: the methods for it"
    many.add_argument("--methods", type=_words, default=list(METHODS), metavar="A,B", help=meaning)
    many.add_argument("--majority", dest="majorities", type=_shares, default=[None], metavar="P,Q", help="shares")
    many.add_argument("--seeds", type=_seeds, default=[0, 1, 2], metavar="A-B", help="seeds, as 0-4 or 0,2,5")
    many.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel runs (default: 1)")
    _add_out(many, "runs/compare", "replace runs with other settings in the folder")
    add_options(many, leave_out=("majority", "seed"))
    many.set_defaults(command=commands.compare_command)


def _add_audit(added: Any) -> None:
    look = added.add_parser("audit", help="train once and rank the training examples by the harm they did")
    look.add_argument("--top", type=int, default=60, metavar="N", help="examples on the page (default: 60)")
    look.add_argument("--folds", type=int, default=5, metavar="N", help="runs for cleanlab's ranking; 0: none")
    _add_out(look, "runs/DATA-BIAS-audit-SEED", "replace the audit in the folder")
    add_options(look, leave_out=UNUSED)
    look.set_defaults(command=commands.audit_command)


def _add_episodes(added: Any) -> None:
    few = added.add_parser("episodes", help="few-shot learners on unbalanced support sets")
    _add_folder(few, Path("runs/episodes"))
    add_options(few, of=EpisodeConfig)
    few.set_defaults(command=commands.episodes_command)


def _add_demo(added: Any) -> None:
    demo = added.add_parser("demo", help="compare plain training with l2rw, in a few minutes")
    meaning = "folder of data sets (default: METAKERN_DATA); MNIST is used if found there"
    demo.add_argument("--data-dir", metavar="DIR", help=meaning)
    _add_folder(demo, Path("runs/demo"))
    demo.set_defaults(command=commands.demo_command)


def _add_report(added: Any) -> None:
    report = added.add_parser("report", help="rebuild the report of runs; without runs: what this machine can run")
    report.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of finished runs or a comparison")
    report.add_argument("--data-dir", metavar="DIR", help="folder of data sets")
    meaning = "the file to write (default: report.html in the folder; for several runs, in their common folder)"
    report.add_argument("--out", type=Path, metavar="FILE", help=meaning)
    report.set_defaults(command=commands.report_command)


def _add_check(added: Any) -> None:
    checked = added.add_parser("check", help="is metakern exact for your model? exit status 0 if so, 1 if not")
    meaning = "module:function or FILE.py:function, which returns (model, batch, meta_batch[, loss_fn])"
    checked.add_argument("target", metavar="MODULE:FUNCTION", help=meaning)
    checked.add_argument("--examples", type=int, default=8, metavar="N", help="to compare (default: %(default)s)")
    checked.add_argument("--explain", action="store_true", help="print rule, form and cost of each layer")
    checked.add_argument("--allow-unused", action="store_true", help="accept parameters that the losses do not use")
    checked.set_defaults(command=commands.check_command)


def _add_out(command: argparse.ArgumentParser, default: str, overwrite: str) -> None:
    """--out and --overwrite, for commands that do not replace other results."""
    meaning = f"folder (default: {default}, with -2, -3 ... appended if that has results of other settings)"
    command.add_argument("--out", type=Path, metavar="DIR", help=meaning)
    command.add_argument("--overwrite", action="store_true", help=overwrite)


def _add_folder(command: argparse.ArgumentParser, default: Path) -> None:
    command.add_argument("--out", type=Path, default=default, metavar="DIR", help="folder (default: %(default)s)")


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
