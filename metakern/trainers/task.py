"""The data of a run, as specified by its config."""

from __future__ import annotations

from dataclasses import replace

import torch

from metakern.data import Examples, GraphSource, Source, Task, biased, binary_imbalance, is_own, load, node_task
from metakern.methods import find
from metakern.trainers.config import TrainConfig
from metakern.trainers.pretrained import folder_of, tokenizer


def make_source(config: TrainConfig) -> Source:
    """The data set that `config` names, with the tokens of its model.

    Raises: as the loaders.
    """
    folder = folder_of(config.model)
    encode = None if folder is None else tokenizer(folder)
    columns = {"label": config.label, "group": config.group, "leave_out": config.leave_out}
    return load(config.data, config.data_dir, encode=encode, **columns)


def make_task(config: TrainConfig, source: Source | None = None, *, needs_meta: bool = False) -> Task:
    """The data of a run with the biases of its config, from `source` if `make_source(config)` has been called before.

    If neither the method nor the caller needs a meta set, it may lack classes that have too few examples for it.
    Raises: ValueError for options that do not fit the number of classes, and as the loaders.
    """
    source = make_source(config) if source is None else source
    needs_meta = needs_meta or find(config.method).needs_meta
    return replace(_biased(config, source, needs_meta), certain_meta=source.meta is not None or not is_own(config.data))


def _biased(config: TrainConfig, source: Source, needs_meta: bool) -> Task:
    size, meta_per_class, seed = config.train_size, config.meta_per_class, config.seed
    if isinstance(source, GraphSource):
        if config.majority is not None or config.noise is not None:
            raise ValueError(f"--majority and --noise are not for graphs; {config.data} takes --imbalance")
        return node_task(
            source,
            factor=config.imbalance,
            shape=config.imbalance_shape,
            meta_per_class=meta_per_class,
            seed=seed,
        )
    if is_own(config.data):
        size = len(source.train)  # all of them, as they are, unless a bias is asked for
    if len(source.class_names) == 2 and not (is_own(config.data) and config.majority is None):
        if config.imbalance != 1:
            raise ValueError(f"--imbalance is for more than two classes; {config.data} takes --majority and --noise")
        return binary_imbalance(
            source,
            majority=0.995 if config.majority is None else config.majority,
            noise=config.noise,
            rate=config.noise_rate,
            size=size,
            meta_per_class=meta_per_class,
            seed=seed,
        )
    if config.majority is not None:
        raise ValueError(f"--majority is for two classes; {config.data} takes --imbalance and --noise")
    return biased(
        source,
        factor=config.imbalance,
        shape=config.imbalance_shape,
        noise=config.noise,
        rate=config.noise_rate,
        size=None if is_own(config.data) else size,
        meta_per_class=meta_per_class,
        whole_meta=needs_meta,
        seed=seed,
    )


def hold_out(task: Task, share: float, seed: int) -> tuple[Task, Examples]:
    """The task without a random `share` of its training examples; and these, with the labels they have, noise included.

    Raises: ValueError if one of the two would be empty.
    """
    n = len(task.train)
    held = round(share * n)
    if not 0 < held < n:
        raise ValueError(f"--validation {share:g} of {n} training examples leaves {held} for validation")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 5))
    kept, validation = order[held:].sort().values, order[:held].sort().values
    smaller = replace(task, train=task.train.take(kept), clean_targets=task.clean_targets[kept])
    return smaller, task.train.take(validation)


def usable_device(name: str) -> torch.device:
    """The device called `name`.

    Raises: ValueError if it does not exist.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def on_device(examples: Examples, device: torch.device) -> Examples:
    """The same examples with inputs and targets on `device`."""
    return Examples(examples.inputs.to(device), examples.targets.to(device), examples.ids)


def task_on_device(task: Task, device: torch.device) -> Task:
    """The same task with all inputs and targets on `device`, except the true labels."""
    parts = {name: on_device(getattr(task, name), device) for name in ("train", "meta", "test")}
    return replace(task, **parts)
