"""Plainly trained networks, for methods that need one before their own training begins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from metakern.data import Examples
from metakern.data.sampling import shuffled
from metakern.methods.finite import require_finite
from metakern.methods.method import Setup


def train_plainly(
    setup: Setup,
    examples: Examples,
    *,
    steps: int,
    batch_size: int | None = None,
    after_step: Callable[[int, nn.Module], None] | None = None,
    rate: Callable[[int], float] | None = None,
    weights: Tensor | None = None,
    seed: int | None = None,
) -> nn.Module:
    """A copy of the run's model after `steps` plain steps on the mean cross entropy, or on that of weights[N] * l[N].

    Before the first step of a run, the copy has the run's initial parameters; the model itself is not changed.
    Optimizer, batches and their augmentation are those that the run's settings and seed give; the order of the batches
    is that of `seed`, if given. `after_step(k, network)` is called after each step, k = 1 .. steps; step k has
    `rate(k)` times the run's learning rate, by default the run's schedule over `steps` steps.
    Raises: ValueError if the loss of a step is not finite.
    """
    rate = rate or (lambda k: setup.rate_factor(k - 1, steps))
    network = copy.deepcopy(setup.model)
    optimizer = setup.make_optimizer(network)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(setup.seed + 4 if seed is None else seed)
    batches = shuffled(examples.targets.cpu(), batch_size or setup.batch_size, generator)
    for k in trange(1, steps + 1, desc="plain network", unit="step", disable=not setup.progress):
        rows = next(batches).to(examples.targets.device)
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * rate(k)
        inputs = setup.augment(examples.inputs[rows], generator)
        optimizer.zero_grad(set_to_none=True)
        losses = F.cross_entropy(network(inputs), examples.targets[rows], reduction="none")
        loss = (losses if weights is None else weights[rows].to(losses) * losses).mean()
        if not loss.isfinite():
            raise ValueError(f"step {k} of a plain network: its loss is not finite; a smaller --lr usually helps")
        loss.backward()
        optimizer.step()
        if after_step is not None:
            after_step(k, network)
    return network


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode; afterwards each of its modules has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # `model.train()` would reach frozen parts as well
            module.training = True


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, *, batch_size: int = 500) -> Tensor:
    """Logits[n, C] of inputs[n, ...] in evaluation mode; the mode of the model is restored.

    Raises: ValueError if some are not finite.
    """
    with evaluating(model):
        logits = torch.cat([model(part) for part in inputs.split(batch_size)])
    require_finite("prediction", logits)
    return logits
