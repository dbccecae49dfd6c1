"""Re-sampling of the training set before the run, by imbalanced-learn: over-sampling, SMOTE, cleaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from metakern.data import Examples, Task
from metakern.methods.method import Method, NotApplicable, always
from metakern.methods.weighted_step import weighted_step

# smallest class, seed -> a sampler of imbalanced-learn
MakeSampler = Callable[[int, int], Any]


def resampled(task: Task, make: MakeSampler, seed: int, *, copies_only: bool = False) -> Task:
    """The task with re-sampled training examples; the sampler sees inputs[n, ...] flattened.

    An exact copy of a training example has its id and true label; a synthetic example has the id -1, and the label it
    was made for as its true label. `copies_only`: the sampler uses labels alone, so that inputs may also be tokens or
    nodes.
    Raises: NotApplicable for other samplers if inputs are not numbers, and if a class is too small for the sampler,
    with its name.
    """
    inputs, targets = task.train.inputs, task.train.targets
    if not copies_only and not inputs.is_floating_point():
        raise NotApplicable(
            f"re-sampling needs inputs that are numbers to mix; {task.name} has {inputs.dtype} tokens, which only "
            "oversample, undersample and metabalance-raw-oversample take"
        )
    smallest = int(torch.bincount(targets)[targets.unique()].min())
    sampler = make(smallest, seed)
    flat = inputs.reshape(len(inputs), -1).cpu().numpy()
    try:
        chosen, labels = sampler.fit_resample(flat, targets.cpu().numpy())
    except ValueError as error:
        raise NotApplicable(f"{type(sampler).__name__} on {task.name}: {error}") from error
    rows = _origins(flat, np.asarray(chosen, flat.dtype))
    ids = torch.where(rows >= 0, task.train.ids.cpu()[rows], -1)
    truth = torch.where(rows >= 0, task.clean_targets.cpu()[rows], torch.from_numpy(np.asarray(labels, np.int64)))
    made = torch.from_numpy(np.ascontiguousarray(chosen)).to(inputs).view(-1, *inputs.shape[1:])
    train = Examples(
        made, torch.from_numpy(np.asarray(labels, np.int64)).to(targets.device), ids.to(task.train.ids.device)
    )
    return replace(task, train=train, clean_targets=truth.to(task.clean_targets.device))


def _origins(known: np.ndarray, chosen: np.ndarray) -> Tensor:
    """For each row of `chosen` the row of `known` it is an exact copy of, else -1; [k] int64."""
    places = {row.tobytes(): k for k, row in enumerate(known)}
    return torch.tensor([places.get(row.tobytes(), -1) for row in chosen], dtype=torch.int64)


def _over(smallest: int, seed: int) -> Any:
    from imblearn.over_sampling import RandomOverSampler

    return RandomOverSampler(random_state=seed)


def _under(smallest: int, seed: int) -> Any:
    from imblearn.under_sampling import RandomUnderSampler

    return RandomUnderSampler(random_state=seed)


def _neighbours(smallest: int, wanted: int = 5) -> int:
    """5 neighbours, as in the papers; fewer if the smallest class does not have as many others."""
    return max(1, min(wanted, smallest - 1))


def _smote(smallest: int, seed: int) -> Any:
    from imblearn.over_sampling import SMOTE

    return SMOTE(k_neighbors=_neighbours(smallest), random_state=seed)


def _borderline(smallest: int, seed: int) -> Any:
    from imblearn.over_sampling import BorderlineSMOTE

    return BorderlineSMOTE(k_neighbors=_neighbours(smallest), random_state=seed)


def _svm(smallest: int, seed: int) -> Any:
    from imblearn.over_sampling import SVMSMOTE

    return SVMSMOTE(k_neighbors=_neighbours(smallest), random_state=seed)


def _adasyn(smallest: int, seed: int) -> Any:
    from imblearn.over_sampling import ADASYN

    return ADASYN(n_neighbors=_neighbours(smallest), random_state=seed)


def _centroids(smallest: int, seed: int) -> Any:
    from imblearn.under_sampling import ClusterCentroids
    from sklearn.cluster import MiniBatchKMeans

    return ClusterCentroids(estimator=MiniBatchKMeans(n_init=cast(Any, 1), random_state=seed), random_state=seed)


def _near_miss(smallest: int, seed: int) -> Any:
    from imblearn.under_sampling import NearMiss

    return NearMiss(version=1, n_neighbors=min(3, smallest))


def _all_knn(smallest: int, seed: int) -> Any:
    from imblearn.under_sampling import AllKNN

    return AllKNN()


def _smote_enn(smallest: int, seed: int) -> Any:
    from imblearn.combine import SMOTEENN

    return SMOTEENN(smote=_smote(smallest, seed), random_state=seed)


def _method(name: str, summary: str, source: str, make: MakeSampler) -> Method:
    copies_only = make in (_over, _under)
    return Method(
        name,
        summary,
        source,
        always(weighted_step()),
        training_set=lambda task, seed: resampled(task, make, seed, copies_only=copies_only),
    )


RESAMPLING_METHODS = tuple(
    _method(*row)
    for row in (
        ("oversample", "copies of the smaller classes' examples", "imbalanced-learn", _over),
        ("undersample", "as many of each class as the smallest has", "imbalanced-learn", _under),
        ("smote", "points between neighbours of a smaller class", "Chawla et al., JAIR 2002", _smote),
        ("borderline-smote", "the same from the examples near the border", "Han et al., ICIC 2005", _borderline),
        ("svm-smote", "the same from the support vectors", "Nguyen et al., IJKESDP 2011", _svm),
        ("adasyn", "the same, more where other classes are near", "He et al., IJCNN 2008", _adasyn),
        ("cluster-centroids", "the larger classes by their clusters' centres", "imbalanced-learn", _centroids),
        ("near-miss", "those of the larger classes nearest to the smallest", "Mani, Zhang, ICML 2003", _near_miss),
        ("all-knn", "without examples that their neighbours contradict", "Tomek, IEEE SMC 1976", _all_knn),
        (
            "smote-enn",
            "smote, then without contradicted examples",
            "Batista et al., 2004",
            _smote_enn,
        ),
    )
)
