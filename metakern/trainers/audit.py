"""Audit: which training examples are harmful as judged by a small clean set, and which label they seem to deserve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import metakern
from metakern.data import Task
from metakern.data.sampling import shuffled
from metakern.methods import find
from metakern.methods.plain_training import predict
from metakern.trainers.config import TrainConfig
from metakern.trainers.networks import network_for
from metakern.trainers.optimizer import make_optimizer, rate_factor, set_rate
from metakern.trainers.task import task_on_device, usable_device


@dataclass(frozen=True)
class Audit:
    """What a plain training run tells about each training example; arrays [n], probabilities [n, C].

    value: sum, over the steps that used the example, of lr / (batch size) * dots_n: to first order, by how much it
    lowered the meta loss; harmful examples are below 0. scaled: the same with the dots of each step divided by their
    root mean square, so that early steps, whose gradients are large, do not dominate. loss: mean loss. probabilities:
    mean prediction, in evaluation mode, without the first tenth of the run. All are nan for examples that were never
    used.
    """

    value: np.ndarray
    scaled: np.ndarray
    loss: np.ndarray
    probabilities: np.ndarray

    @property
    def suggested(self) -> np.ndarray:
        """The class with the largest mean probability, [n] int64; it is the given one if the network agrees with it.

        -1 for examples without a prediction.
        """
        likeliest = np.nan_to_num(self.probabilities, nan=-1.0).argmax(1)
        return np.where(np.isnan(self.probabilities).any(1), -1, likeliest)

    def harmful_first(self) -> np.ndarray:
        """Row numbers from the lowest value to the highest, then those of examples never used, [n] int64."""
        return np.argsort(self.value, kind="stable")


class Unfinished(ValueError):
    """A step of an audit failed. `found` is what had been measured by then; None if nothing had."""

    def __init__(self, message: str, found: Audit | None) -> None:
        super().__init__(message)
        self.found = found


class _Sums:
    """Sums over the steps, by training example."""

    def __init__(self, examples: int, classes: int) -> None:
        self._sums = torch.zeros(examples, 3, dtype=torch.float64)
        self._seen = torch.zeros(examples, 1, dtype=torch.float64)
        self._probabilities = torch.zeros(examples, classes, dtype=torch.float64)
        self._predicted = torch.zeros(examples, 1, dtype=torch.float64)

    def add(self, rows: Tensor, dots: Tensor, losses: Tensor, lr: float) -> None:
        size = dots.square().mean().sqrt()
        columns = lr / len(rows) * dots, dots / (size + (size == 0)), losses
        self._sums.index_add_(0, rows, torch.stack(columns, 1).cpu().double())
        self._seen.index_add_(0, rows, torch.ones(len(rows), 1, dtype=torch.float64))

    def add_predictions(self, rows: Tensor, probabilities: Tensor) -> None:
        self._probabilities.index_add_(0, rows, probabilities.cpu().double())
        self._predicted.index_add_(0, rows, torch.ones(len(rows), 1, dtype=torch.float64))

    @property
    def any(self) -> bool:
        """Whether a step has been added."""
        return bool(self._seen.any())

    def audit(self) -> Audit:
        value, scaled, loss = torch.where(self._seen > 0, self._sums, torch.nan).T.numpy()
        mean = self._probabilities / self._predicted  # 0 / 0 where never seen
        return Audit(value, scaled, loss / self._seen.squeeze(1).numpy(), mean.numpy())


def audit(config: TrainConfig, task: Task, *, progress: bool = True) -> Audit:
    """One training run on `task` with equal weights, in which the effect of each example on the meta loss is summed up.

    The dots come from the backward pass of the step. With momentum mu, the total effect of an example is about 1 / (1 -
    mu) times its value, equally for all.
    Raises: Unfinished if `metakern.reweight_step` raises ValueError, or if predictions are not finite, including those
    after the last step.
    Source: the first-order form of Wang, Mittal, Song, Jia, "Data Shapley in One Training Run", ICLR 2025, section 4.
    """
    torch.set_num_threads(config.threads)
    device = usable_device(config.device)
    model, task = network_for(task, config.seed, config.model).to(device), task_on_device(task, device)
    optimizer = make_optimizer(config, model)
    plain = find("uniform")
    steps, batch_size = config.total_steps(plain), config.batch_size or plain.batch_size
    batches = shuffled(task.train.targets.cpu(), batch_size, torch.Generator().manual_seed(config.seed + 2))
    sums = _Sums(len(task.train), len(task.class_names))
    meta_batch = task.meta.inputs, task.meta.targets
    for step in tqdm(range(steps), desc="audit", unit="step", disable=not progress):
        rows = next(batches)
        inputs, targets = task.train.inputs[rows], task.train.targets[rows]
        set_rate(optimizer, config.lr * rate_factor(config, step, steps))
        try:
            if step >= steps // 10:
                sums.add_predictions(rows, predict(model, inputs).softmax(1))
            result = metakern.reweight_step(
                model, (inputs, targets), meta_batch, rule=_equal, optimizer=optimizer, engine=config.engine
            )
            sums.add(rows, result.dots, result.losses, optimizer.param_groups[0]["lr"])
            if step == steps - 1:  # no later step would notice that this one diverged
                predict(model, task.meta.inputs)
        except ValueError as error:
            raise Unfinished(f"step {step + 1}: {error}", sums.audit() if sums.any else None) from error
    return sums.audit()


def _equal(dots: Tensor) -> Tensor:
    return torch.full_like(dots, 1 / len(dots))
