"""How well a ranking finds wrong labels, and cleanlab's ranking for comparison."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import numpy as np
import torch

from metakern.data import Task
from metakern.data.sampling import shuffled
from metakern.methods import find
from metakern.methods.plain_training import predict, train_plainly
from metakern.trainers.batches import make_setup
from metakern.trainers.config import TrainConfig
from metakern.trainers.evaluate import roc_area
from metakern.trainers.networks import network_for
from metakern.trainers.task import task_on_device, usable_device


class Detection(NamedTuple):
    """Quality of a ranking by suspicion: area under the ROC curve, and precision among the k most suspicious examples.

    Equally suspicious examples count half in the area; for the precision, they are taken in the order of the rows.
    precision[j] is for k = j / 10 of the number of wrong labels, j = 1 .. 10.
    """

    area: float
    precision: list[float]


def detection(suspicion: np.ndarray, wrong: np.ndarray) -> Detection:
    """How well `suspicion`[n] (larger is more suspicious) finds `wrong`[n] bool; nan counts as least suspicious.

    Raises: ValueError if all labels are right, or all wrong.
    """
    total = int(wrong.sum())
    if not 0 < total < len(wrong):
        raise ValueError(f"detection: some labels must be wrong and some right, got {total} of {len(wrong)} wrong")
    suspicion = np.where(np.isnan(suspicion), -np.inf, suspicion)
    order = np.argsort(-suspicion, kind="stable")
    counts = [max(1, round(total * j / 10)) for j in range(1, 11)]
    area = roc_area(torch.from_numpy(suspicion), torch.from_numpy(wrong))
    return Detection(area, [float(wrong[order[:k]].mean()) for k in counts])


def has_cleanlab() -> bool:
    """Whether cleanlab can be imported."""
    return importlib.util.find_spec("cleanlab") is not None


def held_out_probabilities(config: TrainConfig, task: Task, *, folds: int = 5) -> np.ndarray:
    """Predictions for each training example by networks that did not see it, [n, C], from `folds` plain runs.

    The steps of each are reduced in proportion to its number of examples.
    """
    method = find("uniform")
    task_rows = next(shuffled(task.train.targets, len(task.train), torch.Generator().manual_seed(config.seed + 5)))
    probabilities = torch.empty(len(task.train), len(task.class_names), dtype=torch.float64)
    device = usable_device(config.device)
    task = task_on_device(task, device)
    for fold in range(folds):
        held = task_rows[fold::folds]
        kept = torch.ones(len(task.train), dtype=torch.bool)
        kept[held] = False
        setup = make_setup(config, method, task, network_for(task, config.seed, config.model).to(device), progress=True)
        steps = max(1, round(setup.steps * (1 - 1 / folds)))
        network = train_plainly(setup, task.train.take(kept.nonzero().squeeze(1)), steps=steps)
        probabilities[held] = predict(network, task.train.inputs[held]).softmax(1).cpu().double()
    return probabilities.numpy()


def cleanlab_suspicion(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """1 - cleanlab's label quality (self-confidence) from held-out probabilities[n, C], [n].

    Source: Northcutt, Jiang, Chuang, "Confident Learning", JAIR 2021, and the package cleanlab.
    """
    from cleanlab.rank import get_label_quality_scores

    return 1 - get_label_quality_scores(labels, probabilities)
