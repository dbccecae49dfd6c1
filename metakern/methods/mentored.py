"""Training under a MentorNet: predefined (PD), or data-driven (DD), taught on the clean set with flipped labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.data import Examples
from metakern.data.noise import corrupt, symmetric_matrix
from metakern.methods.mentor import Lesson, MentorNet, Percentile, made_up_lessons, taught
from metakern.methods.method import Batch, Method, Outcome, Setting, Setup
from metakern.methods.plain_training import predict, train_plainly
from metakern.methods.weight_net_step import seeded
from metakern.methods.weighted_step import step_on


@dataclass
class MentoredStep:
    """Equal weights for the first `burn_in` of the run, then w_n = v_n / n with v_n from the mentor, as constants."""

    setup: Setup
    data_driven: bool = False
    burn_in: float = 0.2
    mentor: nn.Module = field(init=False)
    percentile: Percentile = field(default_factory=Percentile)

    def __post_init__(self) -> None:
        self.mentor = seeded(MentorNet, self.setup.seed)

    def prepare(self) -> None:
        generator = torch.Generator().manual_seed(self.setup.seed)
        mentor = seeded(MentorNet, self.setup.seed)
        assert isinstance(mentor, MentorNet)
        lessons = spoilt_lessons(self.setup, generator) if self.data_driven else made_up_lessons(generator)
        self.mentor = taught(mentor, lessons, steps=500)

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        inputs, targets = batch
        losses = F.cross_entropy(model(inputs), targets, reduction="none")
        trust = self.trust(losses.detach(), setting)
        return step_on(losses, optimizer, trust / len(losses) if setting.progress >= self.burn_in else None)

    @torch.no_grad()
    def trust(self, losses: Tensor, setting: Setting) -> Tensor:
        """v[n] in 0..1 for the losses of a batch."""
        known = losses.cpu().float()
        differences = self.percentile.differences(known)
        labels = torch.zeros(len(known), dtype=torch.int64)
        epochs = torch.full_like(labels, min(99, int(100 * setting.progress)))
        return self.mentor(known, differences, labels, epochs).sigmoid().to(losses)

    def state_dict(self) -> dict[str, Any]:
        return {"mentor": self.mentor.state_dict(), "percentile": self.percentile.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mentor.load_state_dict(state["mentor"])
        self.percentile.value = state["percentile"]


def spoilt_lessons(setup: Setup, generator: torch.Generator, *, rate: float = 0.4, looks: int = 20) -> Iterator[Lesson]:
    """Endless lessons from a plain network on the clean set with `rate` of its labels flipped; wanted: [label right].

    The network trains for a tenth of the run's steps; its losses are recorded `looks` times.
    """
    meta = setup.task.meta
    targets = corrupt(meta.targets.cpu(), symmetric_matrix(setup.classes, rate), generator)
    right = (targets == meta.targets.cpu()).float()
    targets, steps = targets.to(meta.targets.device), max(looks, setup.steps // 10)
    percentile, lessons = Percentile(), []

    def look(step: int, network: nn.Module) -> None:
        if step % (steps // looks) == 0:
            losses = F.cross_entropy(predict(network, meta.inputs), targets, reduction="none").cpu().float()
            labels = torch.zeros(len(losses), dtype=torch.int64)
            epochs = torch.full_like(labels, min(99, 100 * step // steps))
            lessons.append((losses, percentile.differences(losses), labels, epochs, right))

    small = replace(setup, batch_size=min(setup.batch_size, len(meta)))
    train_plainly(small, Examples(meta.inputs, targets, meta.ids), steps=steps, after_step=look)
    while True:
        yield lessons[int(torch.randint(len(lessons), (1,), generator=generator))]


MENTORNET_PD = Method(
    "mentornet-pd",
    "a network taught a linear curriculum says how much each example counts",
    "Jiang et al., ICML 2018",
    MentoredStep,
    handles="noise",
)
MENTORNET_DD = Method(
    "mentornet-dd",
    "the same, taught on the clean set with spoilt labels",
    "Jiang et al., ICML 2018",
    lambda setup: MentoredStep(setup, data_driven=True),
    needs_meta=True,
    handles="noise",
)
