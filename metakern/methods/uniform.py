"""Uniform: the plain mean loss, which every other method is measured against."""

from torch import Tensor

from metakern.methods.method import Method, Setting, weighted_step


def uniform_weights(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """w_n = 1 / n."""
    return losses.new_full((len(losses),), 1 / len(losses))


UNIFORM = Method(
    "uniform",
    "the plain mean loss",
    "the baseline of Ren et al., ICML 2018",
    weighted_step(uniform_weights),
    handles="none",
)
