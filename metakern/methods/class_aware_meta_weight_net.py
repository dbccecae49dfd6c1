"""CMW-Net: a weight net with one output for each group of classes of similar size.

As a composition: class counts -> k-means -> group of each class; then `metakern.mwnet_step`, whose weight net sees the
group in addition to the loss. The meta set is a part of the training set: no clean data are needed. Two variants follow
the two settings of the published code, long tails and noisy labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from metakern.methods.loss_curves import lowest_losses
from metakern.methods.method import Batch, Method, Outcome, Setting, Setup, WeightingFunction
from metakern.methods.settings import require_counts, require_shares
from metakern.methods.weight_net_step import WeightNetStep, device_of, seeded, weights_over_losses
from metakern.methods.weighted_step import weighted_step


@dataclass(frozen=True)
class ClassAwareSettings:
    """Settings; the defaults are those of CMW-Net's code for class imbalance.

    groups: number of groups of classes, found by k-means. hidden: width of the weight net. lr, weight_decay: of its
    Adam. plain_share: share of the run that takes plain steps (the code: epochs 0 to 159 of 200). every: the weight net
    steps once in so many steps of the model. lowest: so many training examples of each class form the meta set, those
    of lowest loss; 0: as many as the smallest class has, at random.
    """

    groups: int = 3
    hidden: int = 100
    lr: float = 1e-4
    weight_decay: float = 1e-5
    plain_share: float = 0.8
    every: int = 1
    lowest: int = 0

    def __post_init__(self) -> None:
        require_counts(groups=self.groups, hidden=self.hidden, every=self.every)
        require_shares(plain_share=self.plain_share)
        if self.lowest < 0:
            raise ValueError(f"lowest must be 0 or more, got {self.lowest}")


def class_groups(counts: Tensor, *, groups: int = 3) -> Tensor:
    """The group of each class by k-means on the class counts, 0 for the smallest classes; counts[C] -> [C] int64.

    There are at most as many groups as there are different counts.
    Source: Shu et al., "CMW-Net: Learning a Class-Aware Sample Weighting Mapping", TPAMI 2023.
    """
    from sklearn.cluster import KMeans

    sizes = counts.double().cpu().unsqueeze(1).numpy()
    found = KMeans(min(groups, len(counts.unique())), n_init=cast(Any, 10), random_state=0).fit(sizes)
    rank = found.cluster_centers_[:, 0].argsort().argsort()
    return torch.from_numpy(rank[found.labels_]).long()


class ClassAwareWeightNet(nn.Module):
    """losses[n, 1], groups[n] int64 -> weights[n, 1] in 0..1: a shared hidden layer of 100, one output for each group.

    Source: as `class_groups`.
    """

    def __init__(self, groups: int, hidden: int = 100) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, groups), nn.Sigmoid())

    def forward(self, losses: Tensor, groups: Tensor) -> Tensor:
        return self.layers(losses).gather(1, groups.unsqueeze(1))


def weights_of_groups(weight_net: nn.Module, groups: Tensor, class_names: Sequence[str]) -> WeightingFunction:
    """The weights as functions of the loss, one curve for each group; groups[C] int64."""
    features = {}
    for k in groups.unique():
        members: list[int] = (groups == k).nonzero().flatten().tolist()
        features[", ".join(class_names[c] for c in members)] = (k.unsqueeze(0),)
    return weights_over_losses(weight_net, features)


def balanced_rows(targets: Tensor, generator: torch.Generator) -> Tensor:
    """As many rows of each class as the smallest has, without replacement; targets[n] -> rows[k], on the CPU."""
    targets = targets.cpu()
    classes, counts = targets.unique(return_counts=True)
    order = torch.randperm(len(targets), generator=generator)
    return torch.cat([order[targets[order] == c][: int(counts.min())] for c in classes])


class CMWNetStep:
    """Plain steps, then the weight net, whose meta set is a part of the training set, chosen anew in each epoch."""

    def __init__(self, setup: Setup, settings: ClassAwareSettings) -> None:
        device = device_of(setup.model)
        self.groups = class_groups(setup.task.train.counts(setup.classes), groups=settings.groups).to(device)
        groups = int(self.groups.max()) + 1
        weight_net = seeded(lambda: ClassAwareWeightNet(groups, settings.hidden), setup.seed, device)
        optimizer = torch.optim.Adam(
            weight_net.parameters(), settings.lr, amsgrad=True, weight_decay=settings.weight_decay
        )
        self._setup, self._settings, self._plain = setup, settings, weighted_step()
        self._step = WeightNetStep(weight_net, optimizer, normalise="detached_sum", every=settings.every)
        self._generator = torch.Generator().manual_seed(setup.seed + 6)
        # By loss only once the plain steps have taught the model something.
        none = torch.empty(0, dtype=torch.int64)
        self._subset = none if settings.lowest else balanced_rows(setup.task.train.targets, self._generator)

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        if setting.progress < self._settings.plain_share:
            return self._plain(model, batch, meta_batch, optimizer=optimizer, setting=setting)
        own = self._meta_batch(model, setting.step)
        return self._step(model, batch, own, optimizer=optimizer, setting=setting, features=self.groups[batch[1]])

    def _meta_batch(self, model: nn.Module, step: int) -> Batch:
        train, lowest = self._setup.task.train, self._settings.lowest
        if step % self._setup.steps_per_epoch == 0 or not len(self._subset):
            chosen = lowest_losses(model, train, lowest) if lowest else balanced_rows(train.targets, self._generator)
            self._subset = chosen
        order = torch.randperm(len(self._subset), generator=self._generator)[: self._setup.batch_size]
        rows = self._subset[order].to(train.targets.device)
        return self._setup.augment(train.inputs[rows], self._generator), train.targets[rows]

    def weighting_function(self) -> WeightingFunction:
        return weights_of_groups(self._step.weight_net, self.groups, self._setup.task.class_names)

    def state_dict(self) -> dict[str, Any]:
        return {**self._step.state_dict(), "generator": self._generator.get_state(), "subset": self._subset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step.load_state_dict(state)
        self._generator.set_state(state["generator"])
        self._subset = state["subset"]


def cmw_net(name: str, summary: str, settings: ClassAwareSettings) -> Method:
    """CMW-Net with the given settings, under a name."""
    return Method(
        name,
        summary,
        "Shu et al., TPAMI 2023",
        lambda setup: CMWNetStep(setup, settings),
        handles="noise" if settings.lowest else "both",
        settings=settings,
        rebuilt=partial(cmw_net, name, summary),
    )


CMW_NET = cmw_net(
    "cmw-net",
    "a weight net with an output for each group of classes of like size; no clean data needed",
    ClassAwareSettings(),
)
CMW_NET_NOISE = cmw_net(
    "cmw-net-noise",
    "cmw-net with its code's settings for noisy labels: a short warm-up, and a meta set of examples of low loss",
    ClassAwareSettings(weight_decay=1e-4, plain_share=1 / 30, every=10, lowest=10),
)
