"""corrected.csv: the labels that a method proposes for the training examples at the end of a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from metakern.data import Task
from metakern.trainers.metrics import as_cell

NAME = "corrected.csv"


@runtime_checkable
class Corrects(Protocol):
    """A step that proposes labels for the training examples, [N, C], each row a distribution."""

    def corrected_labels(self, model: nn.Module) -> Tensor: ...


def save_corrected(folder: Path, step: Any, model: nn.Module, task: Task) -> None:
    """Write corrected.csv if `step` proposes labels, with a row for each training example.

    Columns: id; label, the given one; clean_label, the true one; proposed, the likeliest one; its probability; kept,
    the probability of the given one.
    """
    if not isinstance(step, Corrects):
        return
    labels = step.corrected_labels(model).detach().cpu()
    given = task.train.targets.cpu()
    likeliest = labels.max(1)
    kept = labels.gather(1, given.unsqueeze(1)).squeeze(1)
    columns = (task.train.ids.cpu(), given, task.clean_targets.cpu(), likeliest.indices, likeliest.values, kept)
    with (folder / NAME).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "clean_label", "proposed", "probability", "kept"])
        writer.writerows(map(as_cell, row) for row in zip(*(column.tolist() for column in columns), strict=True))


class Correction(NamedTuple):
    """How good proposed labels are, in percent of the examples; nan if there are none of the kind.

    changed: proposed labels that are not the given ones, among all examples; right: those that are true; repaired: the
    same among examples whose given label is wrong; left: among those whose given label is right.
    """

    changed: float
    given_right: float
    right: float
    repaired: float
    left: float


def read_correction(folder: Path) -> Correction | None:
    """The quality of the labels in corrected.csv; None if the run has none."""
    if not (folder / NAME).is_file():
        return None
    with (folder / NAME).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    given, true, proposed = (
        torch.tensor([int(row[name]) for row in rows]) for name in ("label", "clean_label", "proposed")
    )
    right, sound = (proposed == true).double(), given == true
    shares = ((proposed != given).double(), sound.double(), right, right[~sound], right[sound])
    return Correction(*(100 * share.mean().item() for share in shares))


def correction_table(correction: Correction, *, known: bool) -> list[list[str]]:
    """The rows of a table, header first; unless the true labels are `known`, only how many are changed."""
    shown = zip(
        (
            "proposed labels other than the given ones",
            "given labels that are true",
            "proposed labels that are true",
            "of the wrong labels, proposed true",
            "of the true labels, proposed true",
        ),
        correction if known else correction[:1],
    )
    return [["labels", "share"], *([name, f"{share:.1f} %"] for name, share in shown if share == share)]
