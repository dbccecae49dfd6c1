"""The report of an audit: the most harmful examples, a table for labelling tools, the quality of the ranking."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from metakern.data import Examples, Source, Task
from metakern.trainers.audit import Audit
from metakern.trainers.detection import Detection
from metakern.trainers.report import figures
from metakern.trainers.report.gallery import picture, shades
from metakern.trainers.report.page import page, table

COLUMNS = ("rank", "id", "given_label", "suggested_label", "confidence", "value", "scaled_value", "mean_loss")


def _rows(found: Audit, task: Task, order: np.ndarray) -> list[list[str]]:
    names, suggested = task.class_names, found.suggested
    rows = []
    for rank, row in enumerate(order.tolist(), start=1):
        given, other = int(task.train.targets[row]), int(suggested[row])
        numbers = found.probabilities[row, other], found.value[row], found.scaled[row], found.loss[row]
        rows.append([str(rank), str(int(task.train.ids[row])), names[given], "" if other < 0 else names[other]])
        rows[-1] += [f"{number:.6g}" for number in numbers]
    return rows


def write_table(found: Audit, task: Task, source: Source, path: Path) -> Path:
    """Write all training examples as CSV, the most harmful first, with file, row, and text or cells where available."""
    order = found.harmful_first()
    rows = _rows(found, task, order)
    head: list[str] = list(COLUMNS)
    ids = [int(task.train.ids[row]) for row in order.tolist()]
    if source.origins is not None:
        in_tables = source.origins[0].row is not None
        head += ["file", "row"] if in_tables else ["file"]
        for example, line in zip(ids, rows, strict=True):
            file, number = source.origins[example]
            line += [file, str(number)] if in_tables else [file]
    if source.readable is not None:
        head.append("cells" if task.train.inputs.is_floating_point() else "text")
        for example, line in zip(ids, rows, strict=True):
            line.append(source.readable[example])
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def write_page(
    found: Audit,
    task: Task,
    source: Source,
    detections: Mapping[str, Detection],
    notes: Sequence[str],
    path: Path,
    *,
    top: int = 60,
) -> Path:
    """Write the page with the `top` most harmful examples; `detections` holds the quality of each ranking, if known."""
    order = found.harmful_first()[:top]
    suggested = found.suggested
    disagreeing = int(((suggested != task.train.targets.cpu().numpy()) & (suggested >= 0)).sum())
    unknown = int((suggested < 0).sum())
    # Of one's own data nobody knows that they are clean, unless they were marked.
    kind = "clean ones" if source.meta is not None or source.origins is None else "others, with the labels they have"
    lead = (
        f"{len(task.train):,} training examples against {len(task.meta):,} {kind}. {disagreeing:,} have another "
        f"suggested label than the given one."
    )
    if unknown:
        lead += f" {unknown:,} have no suggestion: no batch after the first tenth of the run had them."
    sections = [("", "".join(f"<p>{escape(note)}</p>" for note in notes))]
    if detections:
        sections.append(("Wrong labels found", _detections(detections)))
    sections.append((f"The {len(order)} most harmful examples", _EXPLAINED + _examples(found, task, source, order)))
    path.write_text(page(f"Audit of {task.name}", lead, sections), encoding="utf-8")
    return path


_EXPLAINED = (
    "<p>Most harmful first: the sum over training of learning rate times the inner product of the example's gradient "
    "with that of the clean set is lowest. Under each the given label and, where the network mostly said another, that "
    "one. An example can be harmful with a right label, and a wrong label can do no harm: look before changing.</p>"
)


def _detections(detections: Mapping[str, Detection]) -> str:
    wanted = (0, 4, 9)
    rows = [["ranking", "area under ROC", *(f"precision at {10 * (j + 1)} %" for j in wanted)]]
    for name, measured in detections.items():
        rows.append([name, f"{measured.area:.3f}", *(f"{100 * measured.precision[j]:.1f} %" for j in wanted)])
    best = max(range(1, len(rows)), key=lambda k: float(rows[k][1]))
    text = "<p>The share of wrong labels among the most suspicious; 100 % is as many as there are wrong ones.</p>"
    curves = {name: measured.precision for name, measured in detections.items()}
    return text + table(rows, best=[(best, 1)]) + figures.precision(curves)


def _examples(found: Audit, task: Task, source: Source, order: np.ndarray) -> str:
    rows = _rows(found, task, order)
    if source.readable is None and task.train.inputs.ndim == 4:
        pictures = [
            picture(shades(task.train.inputs[row].cpu().numpy()), _labels(line) + _place(source, int(line[1])))
            for row, line in zip(order.tolist(), rows, strict=True)
        ]
        return f'<div class="gallery">{"".join(pictures)}</div>'
    shown = [["id" if source.origins is None else "row", "given", "suggested", "value", "example"]]
    for row, line in zip(order.tolist(), rows, strict=True):
        example = source.readable[int(line[1])] if source.readable is not None else _numbers(task.train, row)
        where = line[1] if source.origins is None else str(source.origins[int(line[1])].row)
        shown.append([where, line[2], _other_label(line), f"{float(line[5]):.3g}", example])
    return f'<div class="reading">{table(shown)}</div>'


def _other_label(line: list[str]) -> str:
    """The suggested label, if it is not the given one."""
    return line[3] if line[3] != line[2] else ""


def _labels(line: list[str]) -> str:
    return line[2] + (f" → {other}" if (other := _other_label(line)) else "")


def _place(source: Source, example: int) -> str:
    return "" if source.origins is None else f" · {Path(source.origins[example].file).name}"


def _numbers(examples: Examples, row: int) -> str:
    return ", ".join(f"{value:.2g}" for value in examples.inputs[row].flatten().tolist())
