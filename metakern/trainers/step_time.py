"""What a method's step costs, in plain steps, measured here and now."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from metakern.data import Task
from metakern.methods import Setting, find
from metakern.trainers.config import TrainConfig
from metakern.trainers.loop import make_optimizer
from metakern.trainers.networks import network_for


class StepTime(NamedTuple):
    """The median ratio to a plain step with its 20th and 80th percentile, and the plain step's median in seconds."""

    ratio: float
    low: float
    high: float
    plain_seconds: float


def step_time(config: TrainConfig, task: Task, *, pairs: int = 25) -> StepTime:
    """Time `pairs` of a plain step and the method's step, one after the other on the same batch and equal models.

    Interleaving makes whatever else the machine does hit both alike; the first three pairs are not counted.
    """
    torch.set_num_threads(config.threads)
    method = find(config.method)
    meta = task.meta.inputs, task.meta.targets
    setting = Setting(task.train.counts(len(task.class_names)), torch.Generator().manual_seed(0), 0.0, config.engine)
    batches = method.sampler(
        task.train.targets, config.batch_size or method.batch_size, torch.Generator().manual_seed(0)
    )
    sides = []
    for step in (find("uniform").begin(0), method.begin(0)):
        model = network_for(task, config.seed)
        sides.append((step, model, make_optimizer(config, model), []))
    for _ in range(pairs + 3):
        rows = next(batches)
        batch = task.train.inputs[rows], task.train.targets[rows]
        for step, model, optimizer, times in sides:
            began = time.perf_counter()
            step(model, batch, meta, optimizer=optimizer, setting=setting)
            times.append(time.perf_counter() - began)
    plain, ours = (torch.tensor(times[3:], dtype=torch.float64) for *_, times in sides)
    low, middle, high = torch.quantile(ours / plain, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return StepTime(middle, low, high, plain.median().item())
