"""`metakern audit`: a training run, a ranking, a page and a table; other rankings if wrong labels are known."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from metakern.data import Task, contents
from metakern.trainers.audit import Audit, Unfinished, audit
from metakern.trainers.config import TrainConfig
from metakern.trainers.detection import (
    Detection,
    cleanlab_suspicion,
    detection,
    has_cleanlab,
    held_out_probabilities,
)
from metakern.trainers.leaderboard import aligned
from metakern.trainers.place import difference, place
from metakern.trainers.report.audit import write_page, write_table
from metakern.trainers.run_folder import identity, read_json, write_json
from metakern.trainers.task import make_source, make_task

# Options of a run that an audit has no use for, and so does not take.
UNUSED = (
    *("set", "augment", "meta_batch_size", "early_stopping", "validation", "evaluations"),
    *("amp", "checkpoint_seconds", "tensorboard"),
)
NAME = "audit.json"
NO_CLEANLAB = "cleanlab: left out, it is not installed; try: pip install 'metakern[audit]'"


def audit_folder(
    config: TrainConfig, out: Path | None, *, top: int, folds: int, overwrite: bool
) -> AbstractContextManager[Path]:
    """The folder of an audit, see `place`; the default is named after the data.

    Raises: ValueError if `out` has an audit with other settings, unless `overwrite`.
    """
    default = Path("runs") / replace(config, method="audit").name()
    return place(out, default, lambda folder: _other(folder, _identity(config, top, folds)), overwrite=overwrite)


def finished_audit(config: TrainConfig, folder: Path, *, top: int, folds: int) -> str | None:
    """The text to print for the audit in `folder`; None if there is none of these settings and data."""
    record = read_json(folder / NAME)
    return None if record is None or _other(folder, _identity(config, top, folds)) else _told(record, folder)


def _identity(config: TrainConfig, top: int, folds: int) -> dict[str, Any]:
    return {**identity(config, contents(config.data)), "top": top, "folds": folds}


def _other(folder: Path, wanted: dict[str, Any]) -> str | None:
    record = read_json(folder / NAME)
    # Audits did not always have an identity; of those without one nobody knows what their files held.
    return None if record is None else difference("an audit", record.get("identity", record["config"]), wanted)


def run_audit(config: TrainConfig, folder: Path, *, top: int = 60, folds: int = 5, progress: bool = True) -> str:
    """Audit the training set of `config`; audit.csv, audit.html and audit.json in `folder`; the text to print.

    If it is known which labels are wrong, the ranking is compared with that by the highest loss and, with `folds` above
    1, with cleanlab's on held-out predictions.
    Raises: ValueError if top is below 1 or folds is 1 or negative, and if a step fails; what had been measured by then
    is left in audit.csv, without audit.json; as `make_task`.
    """
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    if folds < 0 or folds == 1:
        raise ValueError(f"--folds must be 0 (no cleanlab) or at least 2, got {folds}")
    source = make_source(config)
    task = make_task(config, source, needs_meta=True)
    folder.mkdir(parents=True, exist_ok=True)  # before the work whose results could not be left there
    table = folder / "audit.csv"
    for path in (folder / NAME, folder / "audit.html", table):  # audit.json is there only if all beside it is complete
        path.unlink(missing_ok=True)
    try:
        found = audit(config, task, progress=progress)
    except Unfinished as error:
        if error.found is None:
            raise
        write_table(error.found, task, source, table)
        raise ValueError(f"{error}; what had been measured by then is in {table}") from error
    write_table(found, task, source, table)
    wrong = (task.train.targets != task.clean_targets).cpu().numpy()
    notes, detections = [], {}
    if wrong.any():
        notes.append(f"{wrong.sum():,} of {len(wrong):,} training labels are known to be wrong.")
        detections = _detections(config, task, found, wrong, folds)
        notes.append(_suggestions(task, found, wrong))
        if folds and not has_cleanlab():
            notes.append(NO_CLEANLAB)
    write_page(found, task, source, detections, notes, folder / "audit.html", top=top)
    record = {
        "identity": _identity(config, top, folds),
        "config": asdict(config),
        "notes": notes,
        "rankings": {name: measured._asdict() for name, measured in detections.items()},
    }
    write_json(folder / NAME, record)
    return _told(read_json(folder / NAME), folder)


def _detections(config: TrainConfig, task: Task, found: Audit, wrong: np.ndarray, folds: int) -> dict[str, Detection]:
    rankings = {"value (lr * dot)": -found.value, "value, steps scaled": -found.scaled, "highest loss": found.loss}
    if folds and has_cleanlab():
        probabilities = held_out_probabilities(config, task, folds=folds)
        rankings["cleanlab"] = cleanlab_suspicion(task.train.targets.cpu().numpy(), probabilities)
    return {name: detection(suspicion, wrong) for name, suspicion in rankings.items()}


def _suggestions(task: Task, found: Audit, wrong: np.ndarray) -> str:
    right = found.suggested == task.clean_targets.cpu().numpy()
    return f"For {100 * right[wrong].mean():.1f} % of the wrong labels the suggested one is the true one."


def _told(record: dict[str, Any], folder: Path) -> str:
    """The text to print for an audit.json."""
    rows = [["ranking", "area under ROC", "precision at k"]]
    for name, measured in record["rankings"].items():
        area = "-" if measured["area"] is None else f"{measured['area']:.3f}"
        rows.append([name, area, f"{100 * measured['precision'][-1]:.1f} %"])
    tables = [aligned(rows)] if record["rankings"] else []
    places = [f"table:  {folder / 'audit.csv'}", f"report: {folder / 'audit.html'}"]
    return "\n".join([*record["notes"], *tables, *places])
