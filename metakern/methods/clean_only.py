"""Clean-only (gold-only): plain training on the meta set alone."""

from __future__ import annotations

from dataclasses import replace

from metakern.data import Task
from metakern.methods.method import Method, always
from metakern.methods.weighted_step import weighted_step


def meta_as_training(task: Task, seed: int) -> Task:
    """The task with its meta examples, which have true labels, as the training set."""
    return replace(task, train=task.meta, clean_targets=task.meta.targets)


CLEAN_ONLY = Method(
    "clean-only",
    "plain training on the clean set alone",
    "the baseline of Ren et al., ICML 2018",
    always(weighted_step()),
    steps=2000,
    needs_meta=True,
    handles="both",
    training_set=meta_as_training,
)
GOLD_ONLY = replace(
    CLEAN_ONLY,
    name="gold-only",
    summary="clean-only for as many steps as the others take",
    source="the baseline of Hendrycks et al., NeurIPS 2018",
    steps=8000,
    handles="noise",
)
