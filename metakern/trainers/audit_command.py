"""`metakern audit`: one training run, a ranking, a page and a table; beside other rankings where the truth is known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from metakern.data import Task
from metakern.trainers.audit import Audit, audit
from metakern.trainers.config import TrainConfig
from metakern.trainers.detection import (
    Detection,
    cleanlab_suspicion,
    detection,
    has_cleanlab,
    held_out_probabilities,
)
from metakern.trainers.leaderboard import aligned
from metakern.trainers.report.audit import write_page, write_table
from metakern.trainers.task import make_source, make_task

# Options of a run that an audit has no use for, and so does not take.
UNUSED = (
    *("set", "augment", "meta_batch_size", "early_stopping", "validation", "evaluations"),
    *("device", "amp", "checkpoint_seconds", "tensorboard"),
)
NO_CLEANLAB = "cleanlab: left out, it is not installed; try: pip install 'metakern[audit]'"


def run_audit(config: TrainConfig, folder: Path, *, top: int = 60, folds: int = 5, progress: bool = True) -> str:
    """Audit the training set of `config`; audit.csv, audit.html and audit.json go to `folder`; what to print.

    Where labels are known to be wrong, this ranking stands beside the highest loss and, with `folds` above 1, beside
    cleanlab's on held-out predictions.
    Raises: ValueError when top is below 1 or folds is 1 or negative; as `make_task`.
    """
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    if folds < 0 or folds == 1:
        raise ValueError(f"--folds must be 0 (no cleanlab) or at least 2, got {folds}")
    source = make_source(config)
    task = make_task(config, source)
    folder.mkdir(parents=True, exist_ok=True)  # before the work whose results could not be left there
    found = audit(config, task, progress=progress)
    wrong = (task.train.targets != task.clean_targets).cpu().numpy()
    notes, detections = [], {}
    if wrong.any():
        notes.append(f"{wrong.sum():,} of {len(wrong):,} training labels are known to be wrong.")
        detections = _detections(config, task, found, wrong, folds)
        notes.append(_suggestions(task, found, wrong))
        if folds and not has_cleanlab():
            notes.append(NO_CLEANLAB)
    write_table(found, task, source, folder / "audit.csv")
    write_page(found, task, source, detections, notes, folder / "audit.html", top=top)
    record = {
        "config": asdict(config),
        "notes": notes,
        "rankings": {name: measured._asdict() for name, measured in detections.items()},
    }
    (folder / "audit.json").write_text(json.dumps(record, indent=2) + "\n")
    return "\n".join(
        [*notes, *_printed(detections), f"table:  {folder / 'audit.csv'}", f"report: {folder / 'audit.html'}"]
    )


def _detections(config: TrainConfig, task: Task, found: Audit, wrong: np.ndarray, folds: int) -> dict[str, Detection]:
    rankings = {"value (lr * dot)": -found.value, "value, steps scaled": -found.scaled, "highest loss": found.loss}
    if folds and has_cleanlab():
        probabilities = held_out_probabilities(config, task, folds=folds)
        rankings["cleanlab"] = cleanlab_suspicion(task.train.targets.cpu().numpy(), probabilities)
    return {name: detection(suspicion, wrong) for name, suspicion in rankings.items()}


def _suggestions(task: Task, found: Audit, wrong: np.ndarray) -> str:
    right = found.suggested == task.clean_targets.cpu().numpy()
    return f"For {100 * right[wrong].mean():.1f} % of the wrong labels the suggested one is the true one."


def _printed(detections: dict[str, Detection]) -> list[str]:
    if not detections:
        return []
    rows = [["ranking", "area under ROC", "precision at k"]]
    rows += [[name, f"{one.area:.3f}", f"{100 * one.precision[-1]:.1f} %"] for name, one in detections.items()]
    return [aligned(rows)]
