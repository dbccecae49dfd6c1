"""The training loop that every method shares."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from metakern.data import Task, biased, binary_imbalance, load
from metakern.methods import Method, Outcome, Setting, Setup, find
from metakern.methods.method import Batch, Prepared
from metakern.trainers.config import TrainConfig
from metakern.trainers.evaluate import Errors, measure_errors
from metakern.trainers.ledger import Ledger
from metakern.trainers.metrics import MetricsFile
from metakern.trainers.networks import network_for
from metakern.trainers.run_folder import finish, start


@dataclass(frozen=True)
class Run:
    """A finished run: what it was, what it trained on, the model, its final errors, its seconds, and its folder."""

    config: TrainConfig
    task: Task
    model: nn.Module
    errors: Errors
    seconds: float
    folder: Path


def make_task(config: TrainConfig) -> Task:
    """The data of a run, biased as its config says.

    Raises: ValueError for options that the data set's number of classes does not allow, and as the loaders.
    """
    source = load(config.data, config.data_dir)
    size, meta_per_class, seed = config.train_size, config.meta_per_class, config.seed
    if len(source.class_names) == 2:
        if config.imbalance != 1 or config.noise is not None:
            raise ValueError(f"--imbalance and --noise are for more than two classes; {config.data} takes --majority")
        majority = 0.995 if config.majority is None else config.majority
        return binary_imbalance(source, majority=majority, size=size, meta_per_class=meta_per_class, seed=seed)
    if config.majority is not None:
        raise ValueError(f"--majority is for two classes; {config.data} takes --imbalance and --noise")
    return biased(
        source,
        factor=config.imbalance,
        noise=config.noise,
        rate=config.noise_rate,
        size=size,
        meta_per_class=meta_per_class,
        seed=seed,
    )


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run."""
    return torch.optim.SGD(model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def train(config: TrainConfig, folder: Path, *, progress: bool = True) -> Run:
    """Train as `config` says and leave config.json, metrics.csv, weights.npz, weights.csv and result.json in `folder`.

    Raises: ValueError for names that are not known and when a loss is not finite, DataNotFound for missing data.
    """
    method = find(config.method)
    torch.set_num_threads(config.threads)
    task = method.training_set(make_task(config), config.seed)
    start(folder, config, task)
    model = network_for(task, config.seed)
    began = time.perf_counter()
    metrics = MetricsFile(folder / "metrics.csv", task.class_names)
    if method.fit is None:
        ledger = _run(config, method, task, model, metrics, progress)
    else:
        with metrics:
            model = method.fit(make_setup(config, method, task, model, progress=progress))
        ledger = Ledger(task, config.total_steps(method))
    seconds = time.perf_counter() - began
    errors = measure_errors(model, task.test, len(task.class_names))
    ledger.save(folder)
    finish(folder, config, errors, seconds, config.total_steps(method))
    return Run(config, task, model, errors, seconds, folder)


def make_setup(config: TrainConfig, method: Method, task: Task, model: nn.Module, *, progress: bool = False) -> Setup:
    """What a run of `config` offers its method."""
    return Setup(
        task,
        model,
        config.seed,
        config.total_steps(method),
        config.batch_size or method.batch_size,
        lambda model: make_optimizer(config, model),
        config.engine,
        progress,
    )


def make_batches(config: TrainConfig, method: Method, task: Task) -> Iterator[tuple[Tensor, Batch, Batch]]:
    """Endless: rows[n] in `task.train`, the batch they are, and a meta batch.

    Both streams of rows draw from generators of their own: one method's draws never shift another's batches.
    """
    rows = method.sampler(
        task.train.targets,
        config.batch_size or method.batch_size,
        torch.Generator().manual_seed(config.seed + 2),
    )
    size = config.meta_batch_size or method.meta_batch_size
    meta_rows = (
        repeat(slice(None))
        if size is None
        else method.meta_sampler(task.meta.targets, size, torch.Generator().manual_seed(config.seed + 3))
    )
    for own, meta in zip(rows, meta_rows, strict=False):
        yield own, (task.train.inputs[own], task.train.targets[own]), (task.meta.inputs[meta], task.meta.targets[meta])


def _run(
    config: TrainConfig, method: Method, task: Task, model: nn.Module, metrics: MetricsFile, progress: bool
) -> Ledger:
    setup = make_setup(config, method, task, model, progress=progress)
    steps = setup.steps
    optimizer = make_optimizer(config, model)
    setting = Setting(
        task.train.counts(setup.classes), torch.Generator().manual_seed(config.seed + 1), config.engine, steps=steps
    )
    batches = make_batches(config, method, task)
    take = method.begin(setup)
    if isinstance(take, Prepared):
        take.prepare()
    ledger = Ledger(task, steps)
    evaluate_at = {round(steps * (k + 1) / config.evaluations) for k in range(config.evaluations)}
    with metrics, tqdm(total=steps, desc=method.name, unit="step", disable=not progress) as bar:
        for step in range(1, steps + 1):
            rows, batch, meta_batch = next(batches)
            outcome = take(
                model,
                batch,
                meta_batch,
                optimizer=optimizer,
                setting=replace(setting, indices=rows, step=step - 1),
            )
            _refuse_nonfinite(outcome, step)
            ledger.add(step - 1, rows, outcome.weights)
            metrics.add(outcome)
            if step in evaluate_at:
                metrics.write(step, measure_errors(model, task.test, len(task.class_names)))
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(metrics.brief(), refresh=False)
    return ledger


def _refuse_nonfinite(outcome: Outcome, step: int) -> None:
    broken = int((~torch.isfinite(outcome.losses)).sum())
    if broken:
        raise ValueError(
            f"step {step}: the loss of {broken} of {len(outcome.losses)} examples is not finite; "
            f"a smaller --lr usually helps"
        )
