"""Re-weighting by optimal transport: weights that bring the batch near the clean set, by Sinkhorn's potentials."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.methods.class_weights import effective_number
from metakern.methods.features import features, last_linear
from metakern.methods.method import Batch, Method, Outcome, Setting, Setup


def sinkhorn_potentials(
    cost: Tensor, rows: Tensor, columns: Tensor, *, eps: float = 0.1, iterations: int = 200, tolerance: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Dual potentials f[m], g[n] of entropic transport from rows[m] to columns[n] at cost[m, n], in the log domain.

    The plan is P = rows columns^T exp((f + g - cost) / eps). Iterations end when no entry of f changes by more than
    `tolerance`. By the envelope theorem, g is, up to a constant, the derivative of the transport cost with respect to
    `columns`.
    Source: Cuturi, NIPS 2013; Peyré, Cuturi, "Computational Optimal Transport", 2019, sections 4.4 and 9.1.
    """
    f, g = torch.zeros_like(rows), torch.zeros_like(columns)
    for _ in range(iterations):
        before = f
        f = -eps * torch.logsumexp((g - cost) / eps + columns.log(), 1)
        g = -eps * torch.logsumexp((f.unsqueeze(1) - cost) / eps + rows.log().unsqueeze(1), 0)
        if (f - before).abs().max() <= tolerance:
            break
    return f, g


def combined_cost(meta: Tensor, meta_targets: Tensor, batch: Tensor, targets: Tensor, classes: int) -> Tensor:
    """cost[m, n] = (1 - cosine of the features[., d]) / 2 + [classes differ] / C.

    The second term is half of the mean squared difference between the one-hot labels.
    Source: the "combined" cost of Guo et al., "Learning to Re-weight Examples with Optimal Transport for Imbalanced
    Classification", NeurIPS 2022, section 3.3, with the factors of its code.
    """
    cosine = F.normalize(meta, dim=1) @ F.normalize(batch, dim=1).T
    return (1 - cosine) / 2 + (meta_targets.unsqueeze(1) != targets).to(cosine) / classes


def transported(logits: Tensor, cost: Tensor, *, lr: float = 0.01) -> Tensor:
    """logits[n] of the batch's masses after one gradient step on their transport cost to the meta set, [n].

    d cost / d logits_n = p_n (g_n - sum_k p_k g_k), p = softmax(logits): Sinkhorn's iterations are not differentiated.
    """
    masses = logits.softmax(0)
    _, duals = sinkhorn_potentials(cost, torch.full_like(cost[:, 0], 1 / len(cost)), masses)
    return logits - lr * masses * (duals - (masses * duals).sum())


@dataclass
class TransportStep:
    """Plain steps for the first `plain` of the run; then weights by transport, and only the last layer is trained.

    The second part minimises (1/n) sum_n w_n l_n + (10 / 16) mean_j l'_j over the last linear layer.
    """

    setup: Setup
    plain: float = 0.8
    clean: float = 10 / 16
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        train = self.setup.task.train
        by_class = effective_number(train.counts(self.setup.classes).cpu())
        self.weights = by_class.to(train.targets.device)[train.targets]

    def __call__(
        self, model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        inputs, targets = batch
        losses = F.cross_entropy(model(inputs), targets, reduction="none")
        optimizer.zero_grad(set_to_none=True)
        if setting.progress < self.plain:
            losses.mean().backward()
            optimizer.step()
            return Outcome(torch.full_like(losses, 1 / len(losses)).detach(), losses.detach(), None)
        rows = setting.indices.to(self.weights.device)
        seen = features(model, meta_batch[0]), meta_batch[1], features(model, inputs), targets
        cost = combined_cost(*seen, self.setup.classes)
        self.weights[rows] = transported(self.weights[rows].to(cost), cost).to(self.weights)
        weights = self.weights[rows].to(losses) / len(rows)
        meta_loss = F.cross_entropy(model(meta_batch[0]), meta_batch[1])
        last = list(last_linear(model).parameters())
        gradients = torch.autograd.grad((weights * losses).sum() + self.clean * meta_loss, last)
        for parameter, gradient in zip(last, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return Outcome(weights, losses.detach(), meta_loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


OT_REWEIGHTING = Method(
    "ot-reweighting",
    "weights that carry the batch to the clean set at least cost; last layer only",
    "Guo et al., NeurIPS 2022",
    TransportStep,
    needs_meta=True,
)
