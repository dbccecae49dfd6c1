"""Label noise as defined in the papers: seeded, with the corruption matrix and the true labels kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from metakern.data.examples import Examples, Task


def _others(classes: int) -> Tensor:
    """For each class k the C - 1 other classes, [C, C - 1]."""
    grid = torch.arange(classes).expand(classes, classes)
    return grid[~torch.eye(classes, dtype=torch.bool)].view(classes, classes - 1)


def uniform_matrix(classes: int, rate: float) -> Tensor:
    """1 - rate on the diagonal plus rate / C everywhere: the new label may be any class, including the true one.

    Source: Shu et al., "Meta-Weight-Net", NeurIPS 2019, section 4.2.
    """
    return (1 - rate) * torch.eye(classes, dtype=torch.float64) + rate / classes


def symmetric_matrix(classes: int, rate: float) -> Tensor:
    """1 - rate on the diagonal, rate / (C - 1) elsewhere: a redrawn label is always wrong.

    Source: Ren et al., ICML 2018, section 4.2, "uniform flip". (Its code draws from the first C - 1 classes.)
    """
    off = torch.full((classes, classes), rate / (classes - 1), dtype=torch.float64)
    return off.fill_diagonal_(1 - rate)


def flip_matrix(classes: int, rate: float, generator: torch.Generator, *, partners: int = 1) -> Tensor:
    """1 - rate on the diagonal, rate / partners for each of `partners` other classes, drawn for every class.

    Source: "flip" (one partner): Shu et al., NeurIPS 2019, and MLRNet; "flip2" (two): Shu et al.'s code.
    Raises: ValueError if there are not that many other classes.
    """
    if not 1 <= partners < classes:
        raise ValueError(f"flip_matrix: partners must be 1 to {classes - 1} for {classes} classes, got {partners}")
    matrix = (1 - rate) * torch.eye(classes, dtype=torch.float64)
    for k, others in enumerate(_others(classes)):
        chosen = others[torch.randperm(classes - 1, generator=generator)[:partners]]
        matrix[k, chosen] += rate / partners
    return matrix


def background_matrix(classes: int, rate: float, generator: torch.Generator) -> Tensor:
    """Every class keeps 1 - rate of its labels; the rest become one class, which is drawn once.

    Source: Ren et al., ICML 2018, section 4.2, "background flip".
    """
    matrix = (1 - rate) * torch.eye(classes, dtype=torch.float64)
    matrix[:, torch.randint(classes, (1,), generator=generator)] += rate
    return matrix


def hierarchical_matrix(groups: Tensor, rate: float) -> Tensor:
    """1 - rate on the diagonal, the rest evenly over the other classes of the same group; groups[C] int64.

    A class that is alone in its group keeps its labels.
    Source: the hierarchical corruption of Shu et al.'s code, after Hendrycks et al., NeurIPS 2018.
    """
    same = (groups.unsqueeze(0) == groups.unsqueeze(1)).double().fill_diagonal_(0)
    size = same.sum(1, keepdim=True)
    spread = torch.where(size > 0, rate * same / size.clamp(min=1), 0)
    return spread + torch.diag(1 - spread.sum(1))


def corrupt(targets: Tensor, matrix: Tensor, generator: torch.Generator) -> Tensor:
    """targets[n] int64, each redrawn from its true class's row of matrix[C, C]: the probabilities of the new label.

    Raises: ValueError if matrix is not square or a row does not sum to 1.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"corrupt: matrix must be square, got {list(matrix.shape)}")
    sums = matrix.double().sum(1)
    if not torch.allclose(sums, torch.ones_like(sums)):
        raise ValueError(f"corrupt: every row of matrix must sum to 1, got sums {sums.tolist()}")
    if not len(targets):
        return targets.clone()
    return torch.multinomial(matrix.double()[targets], 1, generator=generator).squeeze(1)


# By the names of the command line; hierarchical noise is the one that needs groups.
_KINDS: dict[str, Callable[[int, float, torch.Generator], Tensor]] = {
    "uniform": lambda classes, rate, generator: uniform_matrix(classes, rate),
    "symmetric": lambda classes, rate, generator: symmetric_matrix(classes, rate),
    "flip": flip_matrix,
    "flip2": lambda classes, rate, generator: flip_matrix(classes, rate, generator, partners=2),
    "background": background_matrix,
}

NOISE_KINDS = (*_KINDS, "hierarchical")


def noise_matrix(
    kind: str, classes: int, rate: float, generator: torch.Generator, *, groups: Tensor | None = None
) -> Tensor:
    """The corruption matrix called `kind`, [C, C] float64; groups[C] int64 is only used by hierarchical noise.

    Raises: ValueError with the known kinds for another name; if rate is not in [0, 1]; for hierarchical noise without
    groups, or with groups of one class each, on which it has no effect.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"unknown noise {kind!r}; there are: {', '.join(NOISE_KINDS)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"noise rate must be in [0, 1], got {rate}")
    if kind == "hierarchical":
        if groups is None or len(groups) != classes:
            found = "none" if groups is None else f"groups of {len(groups)} classes"
            raise ValueError(f"hierarchical noise stays in groups of classes; it needs groups[{classes}], got {found}")
        if len(groups.unique()) == classes:
            raise ValueError(f"hierarchical noise stays in groups of classes; each of {classes} is alone in its group")
        return hierarchical_matrix(groups, rate)
    return _KINDS[kind](classes, rate, generator)


def noisy(task: Task, kind: str, rate: float, generator: torch.Generator, *, groups: Tensor | None = None) -> Task:
    """The task with noise in its training labels; meta set, test set and `clean_targets` are unchanged.

    Raises: as `noise_matrix`.
    """
    matrix = noise_matrix(kind, len(task.class_names), rate, generator, groups=groups)
    train = task.train
    return replace(
        task,
        name=f"{task.name}, {100 * rate:g} % {kind} noise",
        train=Examples(train.inputs, corrupt(train.targets, matrix, generator), train.ids),
        corruption=matrix,
    )
