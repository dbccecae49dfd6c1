"""SAM: the gradient is taken at the worst nearby point. SAM-A: rare classes count more in finding that point."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.methods.class_weights import by_class, inverse_frequency
from metakern.methods.label_smoothing import smoothed_by_class
from metakern.methods.method import Batch, Method, NotApplicable, Outcome, Setting, Step, always
from metakern.methods.weighted_step import Criterion, Rule, cross_entropy, step_on, uniform_weights


def inverse_frequency_weights(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """w_n proportional to 1 / n_c, sum 1 over the batch."""
    return by_class(inverse_frequency(setting.class_counts).to(losses), targets)


def sam_step(*, rho: float = 0.05, ascent: Rule = uniform_weights, criterion: Criterion = cross_entropy) -> Step:
    """e = rho g / |g|, g the gradient of sum_n w_n l_n, w by `ascent`; a step with that of mean_n l_n at theta + e.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, algorithm
    1; for SAM-A the code published with Shwartz-Ziv et al., NeurIPS 2023.
    """

    def step(
        model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> Outcome:
        inputs, targets = batch
        losses = criterion(model(inputs), targets, setting)
        optimizer.zero_grad(set_to_none=True)
        (ascent(losses.detach(), targets, setting) * losses).sum().backward()
        moved = _climb(model, rho)
        optimizer.zero_grad(set_to_none=True)
        criterion(model(inputs), targets, setting).mean().backward()
        with torch.no_grad():
            for parameter, start in moved:
                parameter.copy_(start)
        optimizer.step()
        return Outcome(torch.full_like(losses, 1 / len(losses)).detach(), losses.detach(), None)

    return step


@torch.no_grad()
def _climb(model: nn.Module, rho: float) -> list[tuple[nn.Parameter, Tensor]]:
    """Move the parameters by rho along their gradient; returns (parameter, former value) for those that have one."""
    own = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    length = torch.stack([gradient.norm() for _, gradient in own]).norm()
    moved = [(parameter, parameter.clone()) for parameter, _ in own]
    for parameter, gradient in own:
        parameter.add_(gradient, alpha=float(rho / (length + (length == 0))))
    return moved


def mixed_up(inputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """lam x_n + (1 - lam) x_p(n), the permutation p[n], and lam, drawn uniformly from 0..1, which is Beta(1, 1).

    Raises: NotApplicable for inputs that are not numbers.
    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    if not inputs.is_floating_point():
        raise NotApplicable(f"mixup needs inputs that are numbers to mix, got {inputs.dtype} tokens")
    share = float(torch.rand((), generator=generator))
    partners = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    return share * inputs + (1 - share) * inputs[partners], partners, share


def mixup_step(
    model: nn.Module, batch: Batch, meta_batch: Batch, *, optimizer: torch.optim.Optimizer, setting: Setting
) -> Outcome:
    """A step on mean_n of lam l(z_n, y_n) + (1 - lam) l(z_n, y_p(n)), z the logits of the mixed inputs."""
    inputs, targets = batch
    mixed, partners, share = mixed_up(inputs, setting.generator)
    logits = model(mixed)
    own, other = (F.cross_entropy(logits, labels, reduction="none") for labels in (targets, targets[partners]))
    return step_on(share * own + (1 - share) * other, optimizer)


_SIMPLIFYING = "Shwartz-Ziv et al., NeurIPS 2023"

SAM = Method(
    "sam", "the gradient at the worst point within 0.05", "Foret et al., ICLR 2021", always(sam_step()), handles="both"
)
SAM_A = Method(
    "sam-a",
    "sam, the worst point for the classes weighted alike",
    _SIMPLIFYING,
    always(sam_step(ascent=inverse_frequency_weights)),
)
SIMPLIFYING = Method(
    "simplifying",
    "sam-a, smoothing by class, batches of 32",
    _SIMPLIFYING,
    always(sam_step(ascent=inverse_frequency_weights, criterion=smoothed_by_class)),
    batch_size=32,
)
MIXUP = Method("mixup", "pairs of examples mixed", "Zhang et al., ICLR 2018", always(mixup_step), handles="both")
