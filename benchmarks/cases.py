"""The shapes that are measured, each declared once.

Data are random numbers. Labels are not: real labels leave L2RW with 0.3 to 0.5 of a batch (the rest gets weight zero),
random ones with anything, and the cost depends on it. So each train label is chosen, among all classes, to give its
example a positive dot for the first `KEPT` of the batch and a negative one for the rest; the share that a run really
kept is reported beside its time. `SCALING` grows one size at a time, that share among them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.testing import inputs, models

KEPT = 0.4

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, the shape of one example, and the sizes of both batches.

    `vocabulary` makes the inputs token indices; `targets` is the shape of one example's labels, () for one label;
    `interacting` says that examples see each other, as in batch normalisation.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n: int
    m: int
    classes: int = 10
    vocabulary: int = 0
    targets: tuple[int, ...] = ()
    fused: bool = False
    dtype: torch.dtype = torch.float32
    prototype: float | None = None
    kept: float = KEPT
    interacting: bool = False

    @property
    def shapes(self) -> str:
        return f"n={self.n} m={self.m} example={'x'.join(map(str, self.shape))} classes={self.classes}"


@dataclass(frozen=True)
class Problem:
    """A case on a device: what every provider is given."""

    case: Case
    model: nn.Module
    batch: Batch
    meta_batch: Batch

    def losses(self, batch: Batch) -> Tensor:
        return per_example(self.model(batch[0]), batch[1])


def per_example(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of [n, C] or [n, C, t] logits, mean over positions: [n]."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)


def losses_of(model: nn.Module, batch: Batch) -> Tensor:
    """The same as a `loss_fn`."""
    return per_example(model(batch[0]), batch[1])


TRANSFORMER: dict[str, Any] = dict(shape=(64,), vocabulary=1000)

# `prototype`: plain steps that a plain PyTorch prototype of the method took; the figures to beat.
CPU_CASES = [
    Case("lenet-100-10", lambda: models.lenet(10), (1, 28, 28), 100, 10, prototype=1.39),
    Case("mlp-256-16", models.mlp, (1024,), 256, 16, prototype=0.86),
    Case("mlp-1024-32", models.mlp, (1024,), 1024, 32, prototype=0.88),
    Case("conv-64-16", models.conv_net, (3, 32, 32), 64, 16, prototype=1.53),
    Case("conv-128-10", models.conv_net, (3, 32, 32), 128, 10, prototype=1.35),
    Case("conv-bn-64-16", partial(models.conv_net, normalised=True), (3, 32, 32), 64, 16, interacting=True),
    Case("transformer-32-8", models.Transformer, **TRANSFORMER, n=32, m=8, prototype=1.45),
    Case("transformer-64-4", models.Transformer, **TRANSFORMER, n=64, m=4, prototype=1.26),
    Case("sdpa-32-8", lambda: models.Transformer(fused=True), **TRANSFORMER, n=32, m=8, fused=True, prototype=1.6),
    Case("sdpa-64-4", lambda: models.Transformer(fused=True), **TRANSFORMER, n=64, m=4, fused=True, prototype=1.5),
]

# Of the steps with a second network or a second order.
META_CASES = [
    Case("conv-128-16", models.conv_net, (3, 32, 32), 128, 16),
    Case("transformer-64-8", models.Transformer, **TRANSFORMER, n=64, m=8),
    Case("mlp-256-16", models.mlp, (1024,), 256, 16),
    Case("mlp-1024-32", models.mlp, (1024,), 1024, 32),
    Case("lenet-100-10", lambda: models.lenet(10), (1, 28, 28), 100, 10),
]


def _grown() -> list[Case]:
    """One size at a time, from an MLP of 4 x 512 at 256 / 16 and a transformer of 2 x 128 at 32 / 4, length 32."""
    mlp = Case("", partial(models.mlp, 512), (512,), 256, 16)
    text = Case("", partial(models.Transformer, 128, 2), (32,), 32, 4, vocabulary=1000)
    return [
        *(replace(mlp, name=f"n={n}", n=n) for n in (64, 256, 1024)),
        *(replace(mlp, name=f"m={m}", m=m) for m in (1, 16, 64, 256)),
        *(replace(mlp, name=f"width={w}", build=partial(models.mlp, w), shape=(w,)) for w in (128, 512, 2048)),
        *(replace(mlp, name=f"depth={d}", build=partial(models.mlp, 512, d)) for d in (1, 4, 16)),
        *(replace(mlp, name=f"zeros={1 - kept:.1f}", kept=kept) for kept in (1.0, 0.6, 0.2)),
        *(replace(text, name=f"T={t}", shape=(t,)) for t in (8, 32, 128)),
    ]


SCALING = _grown()


def named(names: Sequence[str], known: Sequence[Case]) -> list[Case]:
    """The cases of these names.

    Raises:
        ValueError: there is none of that name.
    """
    by_name = {case.name: case for case in known}
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"no case {', '.join(map(repr, unknown))}; the cases are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def problem_of(case: Case, device: str = "cpu", seed: int = 0) -> Problem:
    """The model and its batches, seeded, with labels that keep about `KEPT` of the batch."""
    torch.manual_seed(seed)
    model = case.build().to(device=device, dtype=case.dtype)
    batch, meta_batch = (
        (
            _inputs(case, size, seed + place, device),
            inputs.labels(size, *case.targets, classes=case.classes, seed=seed + place + 1),
        )
        for place, size in ((1, case.n), (11, case.m))
    )
    problem = Problem(case, model, _on(batch, device), _on(meta_batch, device))
    return Problem(case, model, (problem.batch[0], _labels_that_keep(problem)), problem.meta_batch)


def _inputs(case: Case, size: int, seed: int, device: str) -> Tensor:
    if case.vocabulary:
        return inputs.labels(size, *case.shape, classes=case.vocabulary, seed=seed, device=device)
    return inputs.normal(size, *case.shape, seed=seed, dtype=case.dtype, device=device)


def _on(batch: Batch, device: str) -> Batch:
    return batch[0].to(device), batch[1].to(device)


def _labels_that_keep(problem: Problem) -> Tensor:
    """Labels by the sign of the dot that each would give: <dz_n, softmax - onehot> from the tangents of the logits.

    The tangents come from a central difference along v, so that no provider is at work here.
    """
    model, meta_batch = problem.model, problem.meta_batch
    params = [param for param in model.parameters() if param.requires_grad]
    direction = torch.autograd.grad(problem.losses(meta_batch).mean(), params)
    norm = torch.stack([grad.double().square().sum() for grad in direction]).sum().sqrt()
    step = float(1e-2 / norm)
    with torch.no_grad():
        torch._foreach_add_(params, direction, alpha=step)
        ahead = model(problem.batch[0]).float()
        torch._foreach_add_(params, direction, alpha=-2 * step)
        behind = model(problem.batch[0]).float()
        torch._foreach_add_(params, direction, alpha=step)
    tangents = (ahead - behind) / (2 * step)
    # dl/dz . dz = sum_c softmax_c dz_c - dz_label: a small dz gives a positive dot, a large one a negative dot.
    keep = torch.arange(len(tangents), device=tangents.device) < round(problem.case.kept * len(tangents))
    return torch.where(keep.view(-1, *(1,) * (tangents.dim() - 2)), tangents.argmin(1), tangents.argmax(1))
