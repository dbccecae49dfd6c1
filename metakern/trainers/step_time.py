"""The cost of a method's step, in plain steps, measured on this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

import torch

from metakern.data import Task
from metakern.methods import Setting, find
from metakern.methods.method import Prepared
from metakern.trainers.batches import make_batches, make_setup
from metakern.trainers.config import TrainConfig
from metakern.trainers.networks import network_for
from metakern.trainers.optimizer import make_optimizer


class StepTime(NamedTuple):
    """The median ratio to a plain step, its 20th and 80th percentiles, and the plain step's median in seconds."""

    ratio: float
    low: float
    high: float
    plain_seconds: float


def step_time(config: TrainConfig, task: Task, *, pairs: int = 25) -> StepTime:
    """Time `pairs` of a plain step and the method's step, in turns on the same batch and equal models.

    The steps are told that nine tenths of the run are over, so that methods with several phases are past their plain
    beginning. Taking turns makes other load of the machine affect both alike. The first three pairs are not counted.
    """
    torch.set_num_threads(config.threads)
    method = find(config.method, config.set)
    setting = Setting(task.train.counts(len(task.class_names)), torch.Generator().manual_seed(0), config.engine)
    sides = []
    for side in (find("uniform"), method):
        model = network_for(task, config.seed, config.model)
        step = side.begin(make_setup(config, side, task, model))
        if isinstance(step, Prepared):
            step.prepare()
        sides.append((step, model, make_optimizer(config, model), []))
    batches = make_batches(config, method, task)
    for _ in range(pairs + 3):
        rows, batch, meta = next(batches)
        for step, model, optimizer, times in sides:
            began = time.perf_counter()
            step(model, batch, meta, optimizer=optimizer, setting=replace(setting, indices=rows, step=90, steps=101))
            times.append(time.perf_counter() - began)
    plain, ours = (torch.tensor(times[3:], dtype=torch.float64) for *_, times in sides)
    low, middle, high = torch.quantile(ours / plain, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return StepTime(middle, low, high, plain.median().item())
