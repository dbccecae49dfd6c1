"""The report of one run, or of several on the same task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from metakern.data import DataNotFound, Examples, Source, contents, is_own, load
from metakern.methods import find
from metakern.trainers.config import TrainConfig
from metakern.trainers.corrected import Correction, correction_table, read_correction
from metakern.trainers.evaluate import roc_area
from metakern.trainers.metrics import read_metrics
from metakern.trainers.report import figures
from metakern.trainers.report.gallery import trusted
from metakern.trainers.report.page import page, sentence, settings, table
from metakern.trainers.run_folder import errors_of, meta_note, read_json, read_result
from metakern.trainers.weighting import read_weighting


class _Record(NamedTuple):
    folder: Path
    name: str
    config: dict[str, Any]
    result: dict[str, Any]
    metrics: dict[str, list[float]]
    weights: dict[str, np.ndarray]
    weighting: tuple[str, list[float], dict[str, list[float]]] | None
    correction: Correction | None

    @property
    def corruption_area(self) -> float:
        """In percent, how often the flipped of a flipped and a kept label has less weight; nan without noise."""
        flipped = self.weights["label"] != self.weights["clean_label"]
        known = ~np.isnan(self.weights["mean_weight"])
        return 100 * roc_area(torch.from_numpy(-self.weights["mean_weight"][known]), torch.from_numpy(flipped[known]))


def _read(folder: Path) -> _Record:
    result = read_result(folder)
    config = read_json(folder / "config.json")
    with np.load(folder / "weights.npz", allow_pickle=False) as stored:
        weights = {name: stored[name] for name in stored.files}
    metrics = read_metrics(folder / "metrics.csv")
    learned = read_weighting(folder), read_correction(folder)
    return _Record(folder, config["method"], config, result, metrics, weights, *learned)


def write_report(
    folders: Sequence[Path], path: Path, *, data_dir: str | None = None, step_times: dict[str, str] | None = None
) -> Path:
    """Write the report of the finished runs in `folders` to `path`, and return it; `step_times` adds a column.

    Raises: FileNotFoundError if a folder has no finished run, ValueError if their data or classes differ.
    """
    records = [_read(folder) for folder in folders]
    for record in records[1:]:
        _require_one_task(records[0], record)
    first = records[0].config
    source = _source(records[0], data_dir)
    sections = [("", _results(records, step_times)), ("Accuracy by class", _accuracies(records))]
    sections.append(("Training", _curves(records)))
    sections += [
        (f"What {label} learned about the training examples", _weights(record, source, label))
        for label, record in zip(_labels(records), records, strict=True)
        if find(record.name).needs_meta or record.weighting is not None
    ]
    known = [entry.name for entry in fields(TrainConfig)]
    values = [(name, str(value)) for name, value in first.items() if name in known or len(records) == 1]
    sections.append(("", settings(values)))
    path.write_text(page(_title(records), _lead(first), sections), encoding="utf-8")
    return path


def _require_one_task(first: _Record, other: _Record) -> None:
    """Raise ValueError if two runs were not tested on the same examples."""
    for what, of in _TASK.items():
        one, another = of(first), of(other)
        if one != another:
            raise ValueError(
                f"{first.folder} and {other.folder} have different {what} ({one}; {another}): one report is of runs on "
                "one task"
            )


_TASK: dict[str, Callable[[_Record], str | None]] = {
    "data": lambda record: record.config["data"],
    "contents of files": lambda record: record.result["identity"].get("contents"),
    "classes": lambda record: ", ".join(record.config["class_names"]),
}


def _source(record: _Record, data_dir: str | None) -> Source | None:
    """The data set of a run; None if it is not available, or if the user's own files have changed since."""
    config = record.config
    if contents(config["data"]) != record.result["identity"].get("contents"):
        return None
    try:
        columns = {name: config.get(name) for name in ("label", "group", "leave_out")}
        return load(config["data"], data_dir or config["data_dir"], **columns)
    except DataNotFound:
        return None


def _title(records: Sequence[_Record]) -> str:
    return f"{' and '.join(record.name for record in records)} on {records[0].config['data']}"


def _lead(config: dict[str, Any]) -> str:
    named = sorted(zip(config["class_shares"], config["class_names"], strict=True))
    # Of many classes the rarest and the most frequent.
    ends = named if len(named) == 2 else [named[0], named[-1]]
    shares = " and ".join(f"{100 * share:.3g} % are {name}" for share, name in ends)
    # Of one's own data nobody knows that they are, unless they were marked.
    kind = "examples" if is_own(config["data"]) else "clean examples"
    return (
        f"{config['train_examples']:,} training examples, of which {shares}; {config['meta_examples']} {kind} "
        f"in the meta set; {config['test_examples']:,} test examples. Seed {config['seed']}."
        + sentence(meta_note(config))
    )


def _results(records: Sequence[_Record], step_times: dict[str, str] | None) -> str:
    names = records[0].config["class_names"]
    shown = [errors_of(record.result).columns(names) for record in records]
    areas = [record.corruption_area for record in records]
    noisy = not all(math.isnan(area) for area in areas)
    head = ["method", *shown[0], *(["weight finds the corruption"] if noisy else []), "steps", "seconds"]
    rows = [head + (["step, in plain steps"] if step_times else [])]
    for label, record, errors, area in zip(_labels(records), records, shown, areas, strict=True):
        row = [label, *(f"{error:.2f} %" for error in errors.values())]
        row += [f"{area:.1f} %"] if noisy else []
        row += [f"{record.result['steps']:,}", f"{record.result['seconds']:.0f}"]
        rows.append(row + ([step_times.get(record.name, "-")] if step_times else []))
    best = min(range(len(records)), key=lambda k: records[k].result["test_error"])
    return table(rows, best=[(best + 1, 1)] if len(records) > 1 else [])


def _accuracies(records: Sequence[_Record]) -> str:
    """A row for each class: its share of the training labels, and the accuracy of each run on it."""
    config = records[0].config
    rows = [["class", "share of training", *_labels(records)]]
    for c, (name, share) in enumerate(zip(config["class_names"], config["class_shares"], strict=True)):
        errors = [record.result["error_by_class"][c] for record in records]
        shown = ["-" if math.isnan(error) else f"{100 - error:.2f} %" for error in errors]
        rows.append([name, f"{100 * share:.3g} %", *shown])
    return table(rows)


def _labels(records: Sequence[_Record]) -> list[str]:
    names = [record.name for record in records]
    # Runs of one method are told apart by their seed, those of one seed by their folder.
    for told in (names, [f"{r.name}, seed {r.config['seed']}" for r in records]):
        if len(set(told)) == len(told):
            return told
    return [f"{record.name}, {record.folder}" for record in records]


def _curves(records: Sequence[_Record]) -> str:
    drawn = {label: record.metrics for label, record in zip(_labels(records), records, strict=True)}
    return figures.curves(drawn)


def _weights(record: _Record, source: Source | None, label: str) -> str:
    columns, class_names = record.weights, record.config["class_names"]
    weights, groups, names = columns["mean_weight"], columns["label"], class_names
    flipped = columns["label"] != columns["clean_label"]
    text = (
        "<p>The mean weight an example had over the run, the first tenth left out, in shares of an equal part: at 1 "
        "it counted as in the plain loss, at 0 it was never used. All of them are in <code>weights.csv</code>.</p>"
    )
    if len(names) > len(figures.SERIES):
        groups, names = _thirds(columns["label"], len(names))
    if flipped.any():
        groups, names = flipped.astype(int), ["label kept", "label flipped"]
        text += _finding(record.corruption_area, flipped)
    text += figures.weight_distribution(weights, groups, names, label)
    if record.weighting is not None:
        text += "<h3>The learned weighting function</h3>" + figures.weighting_function(*record.weighting, label)
    if record.correction is not None:
        # Of one's own data the true labels are known only where noise was added to them.
        known = not is_own(record.config["data"]) or record.config["noise"] is not None
        text += "<h3>The corrected labels</h3>" + table(correction_table(record.correction, known=known))
    if source is None:
        return text + "<p>The images are not shown: the data set is not at hand, or is another now.</p>"
    if source.train.inputs.ndim != 4 or source.train.inputs.shape[1] != 1:
        return text
    text += (
        "<h3>Most and least trusted training images</h3><p>Under each image its mean weight. Images of equal weight, "
        "such as the ones never used, come in the order of the data.</p>"
    )
    return text + trusted(_trained_on(source), columns["id"], groups, weights, names)


def _trained_on(source: Source) -> Examples:
    """All examples that a method may train on; some methods add their meta examples to the training set."""
    if source.meta is None:
        return source.train
    parts = source.train, source.meta
    return Examples(*(torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets", "ids")))


def _thirds(labels: np.ndarray, classes: int) -> tuple[np.ndarray, list[str]]:
    """Groups for many classes: the rarest third, the middle third and the most frequent third of them."""
    rank = np.argsort(np.argsort(np.bincount(labels, minlength=classes), kind="stable"), kind="stable")
    return (3 * rank // classes)[labels], ["rarest third of the classes", "middle third", "most frequent third"]


def _finding(area: float, flipped: np.ndarray) -> str:
    return (
        f"<p>{100 * flipped.mean():.1f} % of the labels were flipped. A flipped label has the lower weight of a random "
        f"pair of a flipped and a kept one in {area:.1f} % of the cases (the area under the ROC curve).</p>"
    )
