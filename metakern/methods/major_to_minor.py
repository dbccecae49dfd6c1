"""M2m: examples of rare classes made from frequent ones, by descent until another network sees the rare class."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.data.sampling import class_balanced
from metakern.methods.method import Batch, Method, NotApplicable, Outcome, Setting, Setup
from metakern.methods.plain_training import evaluating, train_plainly
from metakern.methods.weighted_step import step_on


def seed_chances(counts: Tensor, target: int, *, beta: float = 0.999) -> Tensor:
    """1 - beta^(n_c - n_target) for the classes c that are more frequent than the target, else 0; counts[C] -> [C].

    The class of the seed is drawn in proportion to this; it is also the probability that the result is accepted.
    Source: Kim, Jeong, Shin, "M2m: Imbalanced Classification via Major-to-minor Translation", CVPR 2020, equation 6.
    """
    return 1 - beta ** (counts.double() - counts[target]).clamp(min=0)


def descend(
    start: Tensor,
    seeds: Tensor,
    targets: Tensor,
    guide: nn.Module,
    model: nn.Module,
    limits: tuple[float, float],
    *,
    steps: int = 10,
    size: float = 0.1,
    away: float = 0.5,
) -> Tensor:
    """x after `steps` steps of length `size` that descend CE(guide(x), target) + away * model(x)[seed]; [n, ...].

    `start`[n, ...] is where x begins; seeds[n] and targets[n] are classes. The gradient of each example is scaled to
    length 1, and x is clipped to `limits`.
    Source: as `seed_chances`, equation 3.
    """
    x = start.clamp(*limits)
    for _ in range(steps):
        x.requires_grad_()
        own = model(x).gather(1, seeds.unsqueeze(1)).sum()
        (gradient,) = torch.autograd.grad(F.cross_entropy(guide(x), targets, reduction="sum") + away * own, x)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.ndim - 1))
        x = (x.detach() - size * gradient / length).clamp(*limits)
    return x.detach()


@dataclass
class TranslationStep:
    """Class-balanced plain steps; after `plain` of the run, generated examples replace some of rare classes.

    An example of class k is replaced with probability 1 - n_k / n_max, if the guide assigns the generated one to class
    k with P(k) >= gamma. The guide is a network trained plainly for `plain` of the run's steps. Step lengths are the
    paper's, for pixels in 0..1, and are scaled for other ranges. If no generated example was accepted in the whole run,
    a warning says so: the run was then the same as `resample`.
    """

    setup: Setup
    plain: float = 0.8
    gamma: float = 0.9
    noise: float = 0.5
    guide: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        inputs = self.setup.task.train.inputs
        if not inputs.is_floating_point():
            raise NotApplicable(f"m2m needs inputs that are numbers; {self.setup.task.name} has {inputs.dtype} tokens")
        self._limits = float(inputs.min()), float(inputs.max())
        self._unit = self._limits[1] - self._limits[0] if inputs.ndim == 4 else 1.0
        self._made = self._kept = 0
        self._by_class = [(self.setup.task.train.targets == c).nonzero().squeeze(1) for c in range(self.setup.classes)]
        self.guide = self.setup.model

    def prepare(self) -> None:
        steps = max(1, round(self.plain * self.setup.steps))
        self.guide = train_plainly(self.setup, self.setup.task.train, steps=steps).eval().requires_grad_(False)

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        inputs, targets = batch
        if setting.progress >= self.plain:
            inputs = self.translated(model, inputs, targets, setting)
            if setting.step + 1 == setting.steps and self._made and not self._kept:
                warnings.warn(
                    f"m2m: the guide took none of the {self._made:,} examples made in this run for the class it was to "
                    "be, so none was used and this was class-balanced sampling",
                    stacklevel=2,
                )
        return step_on(F.cross_entropy(model(inputs), targets, reduction="none"), optimizer)

    def translated(self, model: nn.Module, inputs: Tensor, targets: Tensor, setting: Setting) -> Tensor:
        """inputs[n, ...] with some examples of rare classes replaced by generated ones."""
        counts, generator = setting.class_counts.cpu(), setting.generator
        chance = 1 - counts[targets.cpu()] / counts.max()
        chosen = (torch.rand(len(targets), generator=generator) < chance).nonzero().squeeze(1)
        if not len(chosen):
            return inputs
        chances = torch.stack([seed_chances(counts, int(target)) for target in targets[chosen]])
        seeds = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        rows = [self._by_class[c][torch.randint(len(self._by_class[c]), (1,), generator=generator)] for c in seeds]
        start = self.setup.task.train.inputs[torch.cat(rows)]
        drawn = torch.randn(start.shape, generator=generator).to(start)
        unit = drawn / drawn.flatten(1).norm(dim=1).view(-1, *[1] * (drawn.ndim - 1))
        disturbed = start + self.noise * self._unit * unit
        to, size = seeds.to(targets.device), 0.1 * self._unit
        # In evaluation mode, as in the code: what is made must not move the running statistics.
        with evaluating(model):
            made = descend(disturbed, to, targets[chosen], self.guide, model, self._limits, size=size)
        with torch.no_grad():
            sure = self.guide(made).softmax(1).gather(1, targets[chosen].unsqueeze(1)).squeeze(1) >= self.gamma
        lucky = torch.rand(len(chosen), generator=generator) < chances.gather(1, seeds.unsqueeze(1)).squeeze(1)
        kept = (sure.cpu() & lucky).nonzero().squeeze(1)
        self._made, self._kept = self._made + len(made), self._kept + len(kept)
        return inputs.index_copy(0, chosen[kept].to(inputs.device), made[kept.to(made.device)])

    def state_dict(self) -> dict[str, Any]:
        return {"guide": self.guide.state_dict(), "made": self._made, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.guide = train_plainly(self.setup, self.setup.task.train, steps=0).eval().requires_grad_(False)
        self.guide.load_state_dict(state["guide"])
        self._made, self._kept = state["made"], state["kept"]


M2M = Method(
    "m2m",
    "examples of rare classes made out of frequent ones",
    "Kim, Jeong, Shin, CVPR 2020",
    TranslationStep,
    sampler=class_balanced,
)
