"""The training loop that every method shares."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from metakern.data import Examples, Task
from metakern.methods import Method, Setting, find
from metakern.methods.method import Batch, Explained, Fit, NotApplicable, Prepared, Stateful
from metakern.trainers.batches import make_batches, make_setup
from metakern.trainers.checkpoint import (
    drop_checkpoint,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
    save_state,
)
from metakern.trainers.config import TrainConfig
from metakern.trainers.corrected import save_corrected
from metakern.trainers.early_stopping import EarlyStopping
from metakern.trainers.evaluate import Errors, measure_errors
from metakern.trainers.guard import require_finite, save_failure
from metakern.trainers.ledger import Ledger
from metakern.trainers.metrics import MetricsFile
from metakern.trainers.networks import network_for
from metakern.trainers.optimizer import make_optimizer, rate_factor, set_rate
from metakern.trainers.run_folder import finish, identity, start
from metakern.trainers.stopping import Stop, Stopped, never
from metakern.trainers.task import hold_out, make_task, on_device, task_on_device, usable_device
from metakern.trainers.tensorboard import Board
from metakern.trainers.weighting import save_weighting


@dataclass(frozen=True)
class Run:
    """A finished run: config, task, model, final errors, seconds, and folder."""

    config: TrainConfig
    task: Task
    model: nn.Module
    errors: Errors
    seconds: float
    folder: Path


def train(
    config: TrainConfig, folder: Path, *, task: Task | None = None, progress: bool = True, stop: Stop = never
) -> Run:
    """Train as `config` says and leave config.json, metrics.csv, weights, model.pt and result.json in `folder`.

    `task` is the result of `make_task(config)`, if that has been called before. An unfinished run of the same config in
    `folder` resumes from its last checkpoint, with the same results as without the interruption. Any other run there is
    replaced once data, method and network have been made. `stop` is called after every step.
    Raises: ValueError for unknown names, and if a loss or prediction is not finite; DataNotFound for missing data;
    Stopped, after writing a checkpoint, if `stop` returns True.
    """
    method = find(config.method, config.set)
    torch.set_num_threads(config.threads)
    task, validation = make_task(config) if task is None else task, None
    if config.early_stopping is not None:
        task, validation = hold_out(task, config.validation, config.seed)
    task = method.training_set(task, config.seed)
    checkpoint = load_checkpoint(folder, identity(config, task.contents))
    device = usable_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        loop = _Loop(config, method, task, validation, folder, device, progress)
        start(folder, config, task)
        if checkpoint is None:
            drop_checkpoint(folder)
        if method.fit is None:
            loop.begin(checkpoint)
            loop.run(stop)
        else:
            loop.fit(method.fit)
    errors = loop.finish()
    drop_checkpoint(folder)
    return Run(config, loop.task, loop.model, errors, loop.seconds, folder)


class _Loop:
    """The state of a run."""

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        task: Task,
        validation: Examples | None,
        folder: Path,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.config, self.method, self.folder, self.progress = config, method, folder, progress
        self.task = task_on_device(task, device)
        self._identity = identity(config, task.contents)
        self.validation = None if validation is None else on_device(validation, device)
        self.model = network_for(task, config.seed, config.model).to(device)
        self.setup = make_setup(config, method, self.task, self.model, progress=progress)
        self.optimizer = make_optimizer(config, self.model)
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        self.take = method.begin(self.setup) if method.fit is None else None
        self.ledger = Ledger(task, self.setup.steps)
        self.metrics = MetricsFile(folder / "metrics.csv", task.class_names)
        self.stopping = None if config.early_stopping is None else EarlyStopping(config.early_stopping)
        self.board = Board(folder) if config.tensorboard else None
        self.class_counts = self.task.train.counts(self.setup.classes)
        self.step, self.seconds = 0, 0.0
        self.measured: tuple[int, Errors] | None = None

    def fit(self, whole: Fit) -> None:
        """Let a method that has no steps make its model."""
        self._begin_metrics()
        self.model = whole(self.setup)
        self._close()

    def begin(self, checkpoint: dict[str, Any] | None) -> None:
        """Resume from `checkpoint`, or prepare the method for its first step."""
        if checkpoint is not None:
            self._load(checkpoint)
            if self.progress:
                print(f"metakern: going on from step {self.step}", file=sys.stderr)
            return
        self._begin_metrics()
        if isinstance(self.take, Prepared):
            self.take.prepare()
        self.metrics.prepared()
        # After the preparation: what it draws does not shift the dropout of the run.
        torch.manual_seed(self.config.seed)
        if isinstance(self.take, Prepared):
            self._save()

    def _begin_metrics(self) -> None:
        self.metrics.begin(self.step)
        if self.board:
            self.board.begin(self.step)

    def run(self, stop: Stop) -> None:
        """Steps, evaluations and checkpoints until the run is over, or raise Stopped."""
        steps, times = self.setup.steps, self.config.evaluations
        evaluate_at = {round(steps * (k + 1) / times) for k in range(times)}
        batches = make_batches(self.config, self.method, self.task, after=self.step)
        saved = time.monotonic()
        bar = tqdm(total=steps, initial=self.step, desc=self.method.name, unit="step", disable=not self.progress)
        with bar:
            while self.step < steps and not (self.stopping and self.stopping.over):
                drawn = next(batches)
                with self._failures_saved(*drawn):
                    self._take_step(*drawn)
                    if self.step in evaluate_at:
                        self._evaluate()
                asked = stop()
                if asked or time.monotonic() - saved >= self.config.checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
                bar.update()
                if asked:
                    raise Stopped(f"stopped at step {self.step}")
                if self.step % 10 == 0:
                    bar.set_postfix(self.metrics.brief(), refresh=False)
        self._close()

    def _close(self) -> None:
        self.seconds = self.metrics.seconds
        if self.board:
            self.board.close()

    def finish(self) -> Errors:
        """The final errors (of the best model, with early stopping), after everything has been written."""
        errors = self._final_errors()
        self.ledger.save(self.folder)
        save_state(self.model.state_dict(), self.folder / "model.pt")
        if isinstance(self.take, Explained):
            save_weighting(self.folder, self.take.weighting_function())
        save_corrected(self.folder, self.take, self.model, self.task)
        best = self.stopping.best_step if self.stopping else None
        finish(self.folder, self._identity, errors, self.seconds, self.step, best)
        return errors

    def _final_errors(self) -> Errors:
        if self.stopping and self.stopping.best_step:
            self.stopping.restore(self.model)
        elif self.measured is not None and self.measured[0] == self.step:
            return self.measured[1]
        return self._errors(self.task.test)

    @contextmanager
    def _failures_saved(self, rows: torch.Tensor, batch: Batch, meta_batch: Batch) -> Iterator[None]:
        """If the step on these batches, or the evaluation after it, fails within the block, the batches are saved."""
        step = self.step + 1
        try:
            yield
        except NotApplicable:
            raise
        except Exception as error:
            path = save_failure(self.folder, error, step, rows, batch, meta_batch, self.model)
            if isinstance(error, ValueError):
                raise ValueError(f"step {step}: {error}; the batch is in {path}") from error
            raise

    def _take_step(self, rows: torch.Tensor, batch: Batch, meta_batch: Batch) -> None:
        assert self.take is not None
        set_rate(self.optimizer, self.config.lr * rate_factor(self.config, self.step, self.setup.steps))
        setting = Setting(
            self.class_counts, self.generator, self.config.engine, rows, step=self.step, steps=self.setup.steps
        )
        with self._precision():
            outcome = self.take(self.model, batch, meta_batch, optimizer=self.optimizer, setting=setting)
        require_finite(outcome)
        self.ledger.add(self.step, rows, outcome.weights)
        self.metrics.add(outcome)
        self.step += 1

    def _evaluate(self) -> None:
        validation = None if self.validation is None else self._errors(self.validation).test
        errors = self._errors(self.task.test)
        self.measured = self.step, errors
        row = self.metrics.write(self.step, errors, validation)
        if self.stopping and validation is not None:
            self.stopping.add(self.step, validation, self.model)
        if self.board:
            self.board.add(row)

    def _errors(self, examples: Examples) -> Errors:
        with self._precision():
            return measure_errors(self.model, examples, self.setup.classes)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.amp is None:
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16)

    def _parts(self) -> dict[str, Any]:
        """Everything that has a state of its own."""
        parts = {"model": self.model, "optimizer": self.optimizer, "ledger": self.ledger, "metrics": self.metrics}
        return {
            **parts,
            **({"method": self.take} if isinstance(self.take, Stateful) else {}),
            **({"stopping": self.stopping} if self.stopping else {}),
        }

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state.update(step=self.step, generator=self.generator.get_state(), random=random_states())
        save_checkpoint(self.folder, self._identity, state)

    def _load(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.generator.set_state(state["generator"])
        restore_random_states(state["random"])
        self._begin_metrics()
