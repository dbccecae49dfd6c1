"""CMW-Net-SL: the weight decides between an example's label and the prediction of a slowly averaged copy of the model.

As a composition: with soft labels v y + (1 - v) p, mixed for pairs of examples, the weight net is a label net, and the
step is `metakern.mlc_step`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.methods.class_aware_meta_weight_net import ClassAwareWeightNet, class_groups, weights_of_groups
from metakern.methods.features import kept_logits
from metakern.methods.loss_curves import lowest_losses
from metakern.methods.method import Batch, Method, NotApplicable, Outcome, Setting, Setup, WeightingFunction
from metakern.methods.plain_training import predict
from metakern.methods.settings import require_counts, require_shares
from metakern.methods.weight_net_step import device_of, seeded
from metakern.methods.weighted_step import weighted_step


@dataclass(frozen=True)
class SoftSettings:
    """Settings; the defaults are those of CMW-Net's code for noisy labels.

    groups: number of groups of classes, found by k-means. hidden: width of the weight net. lr, weight_decay: of its
    Adam. warm_up: share of the run that takes plain steps (10 of 300 epochs). every: the weight net steps once in so
    many steps of the model. teacher_decay: of the averaged copy, per step. meta_per_class: at most so many examples of
    low loss per class form the meta set.
    """

    groups: int = 3
    hidden: int = 100
    lr: float = 1e-4
    weight_decay: float = 1e-4
    warm_up: float = 1 / 30
    every: int = 10
    teacher_decay: float = 0.997
    meta_per_class: int = 10

    def __post_init__(self) -> None:
        require_counts(groups=self.groups, hidden=self.hidden, every=self.every, meta_per_class=self.meta_per_class)
        require_shares(warm_up=self.warm_up, teacher_decay=self.teacher_decay)


class Mixed(NamedTuple):
    """Examples mixed with a permutation of themselves: share x_n + (1 - share) x_order[n]."""

    inputs: Tensor
    order: Tensor
    share: float


def mixed(inputs: Tensor, generator: torch.Generator) -> Mixed:
    """Mixup with share max(b, 1 - b), b from Beta(1, 1), the same for the whole batch: row n is mostly example n.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; the larger share as in CMW-Net's code.
    """
    share = float(torch.rand((), generator=generator))
    share = max(share, 1 - share)
    order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    return Mixed(share * inputs + (1 - share) * inputs[order], order, share)


class SoftLabels(nn.Module):
    """Targets of mixed examples: share t_n + (1 - share) t_order[n], t_n = v_n onehot(y_n) + (1 - v_n) p_n.

    v_n = weight_net(cross entropy of mixed example n for y_n, group of y_n); wherever y_n is part of a mixture, v_n is
    its weight.
    Called as `net(labels[n], losses[n, 1], groups[n], pseudo[n, C], order[n], share)`.
    Source: Shu et al., TPAMI 2023, and its code for noisy labels.
    """

    def __init__(self, weight_net: ClassAwareWeightNet) -> None:
        super().__init__()
        self.weight_net = weight_net

    def forward(
        self, labels: Tensor, losses: Tensor, groups: Tensor, pseudo: Tensor, order: Tensor, share: float
    ) -> Tensor:
        weights = self.weights(losses, groups)
        targets = weights * F.one_hot(labels, pseudo.shape[1]).to(pseudo) + (1 - weights) * pseudo
        return share * targets + (1 - share) * targets[order]

    def weights(self, losses: Tensor, groups: Tensor) -> Tensor:
        """v[n, 1] in the precision of the weight net."""
        return self.weight_net(losses.to(next(self.weight_net.parameters())), groups)


class SoftStep:
    """A plain warm-up; then steps on mixed examples with soft labels, one of `every` with the weight net."""

    def __init__(self, setup: Setup, settings: SoftSettings) -> None:
        if not setup.task.train.inputs.is_floating_point():
            raise NotApplicable("cmw-net-sl mixes inputs, which tokens cannot be; cmw-net takes them")
        device = device_of(setup.model)
        self._setup, self._settings, self._plain = setup, settings, weighted_step()
        self._groups = class_groups(setup.task.train.counts(setup.classes), groups=settings.groups).to(device)
        groups = int(self._groups.max()) + 1
        net = seeded(lambda: ClassAwareWeightNet(groups, settings.hidden), setup.seed, device)
        self._labels = SoftLabels(net)  # type: ignore[arg-type]
        self._optimizer = torch.optim.Adam(self._labels.parameters(), settings.lr, weight_decay=settings.weight_decay)
        self._teacher = copy.deepcopy(setup.model)
        self._generator = torch.Generator().manual_seed(setup.seed + 6)
        self._trusted = torch.arange(len(setup.task.train))

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        if setting.step % self._setup.steps_per_epoch == 0:
            self._trusted = lowest_losses(self._teacher, self._setup.task.train, self._settings.meta_per_class)
        if setting.progress < self._settings.warm_up:
            outcome = self._plain(model, batch, meta_batch, optimizer=optimizer, setting=setting)
        else:
            outcome = self._soft(model, batch, optimizer, setting.step % self._settings.every == 0)
        self._follow(model)
        return outcome

    def _soft(self, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, learn: bool) -> Outcome:
        inputs, labels = batch
        pseudo = predict(self._teacher, inputs).softmax(1)
        mixture = mixed(inputs, self._generator)
        groups, seen = self._groups[labels], []

        def known(logits: Tensor) -> tuple[Any, ...]:
            losses = F.cross_entropy(logits, labels, reduction="none").unsqueeze(1)
            seen[:] = [losses, groups, pseudo, mixture.order, mixture.share]
            return tuple(seen)

        meta_loss = None
        if learn:
            with kept_logits(model) as kept:
                result = metakern.mlc_step(
                    model,
                    self._labels,
                    (mixture.inputs, labels),
                    self._meta_batch(),
                    label_optimizer=self._optimizer,
                    virtual_lr=None,
                    features=lambda model, batch: known(kept()),
                    optimizer=optimizer,
                )
            losses, meta_loss = result.losses, result.meta_loss
        else:
            logits = model(mixture.inputs)
            with torch.no_grad():
                targets = self._labels(labels, *known(logits.detach()))
            losses = F.cross_entropy(logits, targets.to(logits), reduction="none")
            optimizer.zero_grad(set_to_none=True)
            losses.mean().backward()
            optimizer.step()
        with torch.no_grad():
            weights = self._labels.weights(seen[0], groups)
        return Outcome(weights.squeeze(1).to(losses) / len(weights), losses.detach(), meta_loss)

    def _meta_batch(self) -> Batch:
        train = self._setup.task.train
        chosen = torch.randperm(len(self._trusted), generator=self._generator)[: self._setup.batch_size]
        rows = self._trusted[chosen].to(train.targets.device)
        mixture = mixed(self._setup.augment(train.inputs[rows], self._generator), self._generator)
        targets = F.one_hot(train.targets[rows], self._setup.classes).to(mixture.inputs)
        return mixture.inputs, mixture.share * targets + (1 - mixture.share) * targets[mixture.order]

    @torch.no_grad()
    def _follow(self, model: nn.Module) -> None:
        """teacher <- decay teacher + (1 - decay) model; buffers are copied from the model."""
        for slow, fast in zip(self._teacher.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 1 - self._settings.teacher_decay)
        for slow, fast in zip(self._teacher.buffers(), model.buffers(), strict=True):
            slow.copy_(fast)

    def weighting_function(self) -> WeightingFunction:
        """How far the given label is trusted."""
        return weights_of_groups(self._labels.weight_net, self._groups, self._setup.task.class_names)

    def state_dict(self) -> dict[str, Any]:
        return {
            "labels": self._labels.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "teacher": self._teacher.state_dict(),
            "generator": self._generator.get_state(),
            "trusted": self._trusted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._labels.load_state_dict(state["labels"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._teacher.load_state_dict(state["teacher"])
        self._generator.set_state(state["generator"])
        self._trusted = state["trusted"]


def cmw_net_sl(settings: SoftSettings) -> Method:
    """CMW-Net-SL with the given settings."""
    return Method(
        "cmw-net-sl",
        "the weight says how far the label is believed and how far a slow copy of the model; mixup; images and tables",
        "Shu et al., TPAMI 2023",
        lambda setup: SoftStep(setup, settings),
        batch_size=128,
        handles="both",
        settings=settings,
        rebuilt=cmw_net_sl,
    )


CMW_NET_SL = cmw_net_sl(SoftSettings())
