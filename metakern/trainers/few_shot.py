"""Training and testing of few-shot learners on episodes with unbalanced support sets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from metakern.data import Task
from metakern.data.episodes import ClassSplit, Episode, Pool, draw_episode
from metakern.methods.finite import require_finite
from metakern.methods.maml import adapted
from metakern.methods.prototypes import prototype_logits
from metakern.methods.support_balance import BALANCES, oversampled
from metakern.trainers.episode_config import EpisodeConfig
from metakern.trainers.networks import network_for
from metakern.trainers.task import on_device

EMBEDDING = 64  # outputs of ProtoNet's network


class Scores(NamedTuple):
    """Accuracy on test episodes in percent: of each episode [e], and by the number of shots that a class had."""

    accuracy: Tensor
    by_shots: dict[int, float]

    @property
    def interval(self) -> float:
        """Half the 95 % confidence interval of the mean over episodes."""
        return half_interval(self.accuracy)


def half_interval(values: Tensor) -> float:
    """1.96 standard errors of the mean of values[e], e at least 2."""
    return 1.96 * float(values.std()) / math.sqrt(len(values))


class Learner:
    """A network, how it learns from a support set, and how it deals with the imbalance of that set."""

    def __init__(self, name: str, balance: str, config: EpisodeConfig, pool: Pool) -> None:
        self.name, self._balance, self._config = name, BALANCES[balance], config
        outputs = EMBEDDING if name == "protonet" else config.way
        examples = pool.examples
        stand_in = Task(name, examples, examples, examples, tuple(map(str, range(outputs))), examples.targets)
        self.model = network_for(stand_in, config.seed, config.model).to(config.device)
        self._copies = torch.Generator().manual_seed(config.seed + 3)

    def logits(self, episode: Episode, loss: Callable[[Tensor, Tensor], Tensor], *, order: int) -> Tensor:
        """Logits of the query examples, [q, K], given the support set; `order` is that of MAML's derivatives."""
        support = oversampled(episode.support, self._copies) if self._balance.fills_up else episode.support
        if self.name == "protonet":
            return prototype_logits(self.model, support, episode.query.inputs)
        steps, lr = self._config.inner_steps, self._config.inner_lr
        parameters = adapted(self.model, support, loss, steps=steps, lr=lr, order=order)
        return functional_call(self.model, parameters, (episode.query.inputs,))

    def query_loss(self, episode: Episode) -> Tensor:
        """The loss to train on, with its graph back to the model's parameters."""
        counts = torch.bincount(episode.support.targets)
        loss = partial(self._loss, counts)
        return loss(self.logits(episode, loss, order=2 if self.name == "maml" else 1), episode.query.targets)

    def predictions(self, episode: Episode) -> Tensor:
        """The classes of the query examples, [q] int64.

        Raises: ValueError when a logit is not finite.
        """
        counts = torch.bincount(episode.support.targets)
        with torch.no_grad():
            logits = self.logits(episode, partial(self._loss, counts), order=1)
        require_finite("prediction", logits)
        return logits.argmax(1)

    def _loss(self, counts: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return self._balance.loss(logits, targets, counts)


def episodes(pool: Pool, shape: str, count: int, config: EpisodeConfig, seed: int) -> Iterator[Episode]:
    """`count` episodes from `pool`, determined by `seed`, on the device of `config`."""
    generator, device = torch.Generator().manual_seed(seed), torch.device(config.device)
    for _ in range(count):
        episode = draw_episode(pool, config.shots(shape, generator), config.queries, generator)
        yield Episode(on_device(episode.support, device), on_device(episode.query, device), episode.classes)


def fit(learner: Learner, split: ClassSplit, config: EpisodeConfig, *, progress: bool = True) -> None:
    """Train on episodes of the training classes, and keep the parameters that were best on the validation classes.

    Raises: ValueError if a loss or, in a validation, a logit is not finite.
    """
    together = 1 if learner.name == "protonet" else config.episodes_per_step
    steps = max(1, config.train_episodes // together)
    optimizer = torch.optim.Adam(learner.model.parameters(), config.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, steps // 2))
    drawn = episodes(split.train, config.train_shape, steps * together, config, config.seed + 1)
    best, kept = -math.inf, learner.model.state_dict()
    for step in tqdm(range(steps), desc=learner.name, unit="step", leave=False, disable=not progress):
        learner.model.train()
        optimizer.zero_grad()
        for _ in range(together):
            loss = learner.query_loss(next(drawn))
            if not loss.isfinite():
                raise ValueError(
                    f"step {step + 1} of {learner.name}: its loss is not finite; a smaller --lr usually helps"
                )
            (loss / together).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) * config.validations // steps > step * config.validations // steps:
            held = episodes(split.validation, config.train_shape, config.validation_episodes, config, config.seed + 2)
            found = float(judge(learner, held).accuracy.mean())
            if found > best:
                best, kept = found, copy.deepcopy(learner.model.state_dict())
    learner.model.load_state_dict(kept)


def judge(learner: Learner, drawn: Iterator[Episode]) -> Scores:
    """Accuracy of a learner on the given episodes."""
    learner.model.eval()
    accuracy: list[float] = []
    by_shots: dict[int, list[float]] = {}
    for episode in drawn:
        right = (learner.predictions(episode) == episode.query.targets).double()
        accuracy.append(100 * float(right.mean()))
        counts = torch.bincount(episode.support.targets).tolist()
        # The queries of a class stand together, as many of each.
        for count, share in zip(counts, right.view(len(counts), -1).mean(1).tolist(), strict=True):
            by_shots.setdefault(count, []).append(100 * share)
    return Scores(torch.tensor(accuracy).double(), {k: fmean(by_shots[k]) for k in sorted(by_shots)})
