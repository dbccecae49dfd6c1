"""Random: rectified Gaussian weights, a baseline that shows how much of a gain is mere regularisation."""

import torch
from torch import Tensor

from metakern.methods.method import Method, Setting, always
from metakern.methods.weighted_step import weighted_step


def random_weights(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """w_n = max(z_n, 0) / (sum + [sum == 0]), z_n ~ N(0, 1) drawn anew for each batch: about half are 0.

    Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, section 4.1.
    """
    drawn = torch.randn(len(losses), generator=setting.generator).to(losses).clamp_(min=0)
    total = drawn.sum()
    return drawn / (total + (total == 0))


RANDOM = Method(
    "random",
    "rectified Gaussian weights, drawn anew for each batch",
    "the baseline of Ren et al., ICML 2018",
    always(weighted_step(random_weights)),
    handles="both",
)
