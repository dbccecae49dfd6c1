"""CMW-Net: a weight net with one output for each group of classes of like size.

As a composition: class counts -> k-means -> group of each class; then `metakern.mwnet_step` with the group as what the
weight net sees beside the loss. Its meta set is a balanced part of the training set: no clean data are held out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metakern.methods.method import Batch, Method, Outcome, Setting, Setup, WeightingFunction
from metakern.methods.weight_net_step import WeightNetStep, device_of, seeded
from metakern.methods.weighted_step import weighted_step

PLAIN_SHARE = 0.8  # of the run; epochs 0 to 159 of 200


def class_groups(counts: Tensor, *, groups: int = 3) -> Tensor:
    """The group of each class by k-means on the class counts, 0 for the smallest classes; counts[C] -> [C] int64.

    There are no more groups than different counts.
    Source: Shu et al., "CMW-Net: Learning a Class-Aware Sample Weighting Mapping", TPAMI 2023.
    """
    from sklearn.cluster import KMeans

    sizes = counts.double().cpu().unsqueeze(1).numpy()
    found = KMeans(min(groups, len(counts.unique())), n_init=10, random_state=0).fit(sizes)
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


def balanced_rows(targets: Tensor, generator: torch.Generator) -> Tensor:
    """As many rows of every class as the smallest has, drawn without replacement; targets[n] -> rows[k], on the CPU."""
    targets = targets.cpu()
    classes, counts = targets.unique(return_counts=True)
    order = torch.randperm(len(targets), generator=generator)
    return torch.cat([order[targets[order] == c][: int(counts.min())] for c in classes])


class CMWNetStep:
    """Plain steps for four fifths of the run, then steps of the weight net on a balanced part of the training set."""

    def __init__(self, setup: Setup) -> None:
        device = device_of(setup.model)
        self.groups = class_groups(setup.task.train.counts(setup.classes)).to(device)
        weight_net = seeded(lambda: ClassAwareWeightNet(int(self.groups.max()) + 1), setup.seed, device)
        optimizer = torch.optim.Adam(weight_net.parameters(), 1e-4, amsgrad=True, weight_decay=1e-5)
        self._setup, self._plain = setup, weighted_step()
        self._step = WeightNetStep(weight_net, optimizer, normalise="detached_sum")
        self._generator = torch.Generator().manual_seed(setup.seed + 6)
        self._subset = balanced_rows(setup.task.train.targets, self._generator)

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        if setting.progress < PLAIN_SHARE:
            return self._plain(model, batch, meta_batch, optimizer=optimizer, setting=setting)
        own = self._meta_batch(setting.step)
        return self._step(model, batch, own, optimizer=optimizer, setting=setting, features=self.groups[batch[1]])

    def _meta_batch(self, step: int) -> Batch:
        train = self._setup.task.train
        if step % self._setup.steps_per_epoch == 0:
            self._subset = balanced_rows(train.targets, self._generator)
        order = torch.randperm(len(self._subset), generator=self._generator)[: self._setup.batch_size]
        rows = self._subset[order].to(train.targets.device)
        return train.inputs[rows], train.targets[rows]

    def weighting_function(self) -> WeightingFunction:
        names = self._setup.task.class_names
        features = {}
        for k in self.groups.unique():
            members = (self.groups == k).nonzero().flatten().tolist()
            features[", ".join(names[c] for c in members)] = (k.unsqueeze(0),)
        return self._step.weighting_function(features)

    def state_dict(self) -> dict[str, Any]:
        return {**self._step.state_dict(), "generator": self._generator.get_state(), "subset": self._subset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step.load_state_dict(state)
        self._generator.set_state(state["generator"])
        self._subset = state["subset"]


CMW_NET = Method(
    "cmw-net",
    "a weight net with an output for each group of classes of like size; no clean data needed",
    "Shu et al., TPAMI 2023",
    CMWNetStep,
    handles="both",
)
