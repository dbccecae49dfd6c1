"""What a run offers its method: the setup before the first step, and the batches of each step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, islice, repeat

import numpy as np
import torch
from torch import Tensor, nn

from metakern.data import Task, crop_and_flip
from metakern.methods import Method, Setup
from metakern.methods.method import DEFERRED, Augment, Batch, unchanged
from metakern.trainers.config import TrainConfig
from metakern.trainers.optimizer import make_optimizer, rate_factor


def make_setup(config: TrainConfig, method: Method, task: Task, model: nn.Module, *, progress: bool = False) -> Setup:
    """What a run of `config` offers `method`."""
    return Setup(
        task,
        model,
        config.seed,
        config.total_steps(method),
        config.batch_size or method.batch_size,
        lambda model: make_optimizer(config, model),
        progress,
        lambda step, steps: rate_factor(config, step, steps),
        _augment(config),
    )


def _augment(config: TrainConfig) -> Augment:
    return crop_and_flip if config.augment is not None else unchanged


def make_batches(
    config: TrainConfig, method: Method, task: Task, *, after: int = 0
) -> Iterator[tuple[Tensor, Batch, Batch]]:
    """Endless: rows[n] in `task.train`, the batch of these rows, and a meta batch; without the first `after`.

    Training and meta rows are drawn by separate generators, so that what one method draws does not change the batches
    of another.
    """
    device = task.train.targets.device
    size = config.meta_batch_size or method.meta_batch_size
    rows = _rows(config, method, task)
    meta_rows = (
        repeat(torch.arange(len(task.meta)))
        if size is None
        else method.meta_sampler(task.meta.targets.cpu(), size, torch.Generator().manual_seed(config.seed + 3))
    )
    augment = _augment(config)
    for step, (own, meta) in islice(enumerate(zip(rows, meta_rows, strict=False)), after, None):
        own, meta = own.to(device), meta.to(device)
        # A generator for each step: a run that goes on from its checkpoint draws what it would have drawn.
        generator = _generator_of(config.seed + 4, step)
        inputs = augment(task.train.inputs[own], generator)
        meta_inputs = augment(task.meta.inputs[meta], generator)
        yield own, (inputs, task.train.targets[own]), (meta_inputs, task.meta.targets[meta])


def _rows(config: TrainConfig, method: Method, task: Task) -> Iterator[Tensor]:
    """Endless: rows[n] in `task.train` of one batch after another."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    given = task.train.targets.cpu(), config.batch_size or method.batch_size, generator
    rows = method.sampler(*given)
    if method.late_sampler is None:
        return rows
    return chain(islice(rows, math.ceil(DEFERRED * config.total_steps(method))), method.late_sampler(*given))


def _generator_of(seed: int, step: int) -> torch.Generator:
    """From both numbers: torch's CPU generator uses only the low 32 bits of a seed, too few to hold them both."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
