"""Proportion: weights by inverse class frequency, normalised over the batch, and the variant in the paper's code."""

from torch import Tensor

from metakern.methods.method import Method, NotApplicable, Setting, always
from metakern.methods.weighted_step import weighted_step


def inverse_share_weights(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """w_n = (1 / share of n's class) / sum over the batch.

    Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, section 4.1.
    """
    weights = (1 / setting.class_shares.to(losses))[targets]
    return weights / weights.sum()


def opposite_share_weights(losses: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    """w_n = 1 - share of n's class, for two classes; not normalised, although the loss is a sum.

    For two classes this is proportional to the inverse share, but the expected sum over a batch is 2 n p (1 - p): for a
    batch of 100, 18 at majority p = 0.9 and 1 at 0.995. So the effective learning rate falls by a factor of 18 between
    these.
    Raises: NotApplicable unless there are two classes.
    Source: the code published with Ren et al., ICML 2018.
    """
    if len(setting.class_counts) != 2:
        raise NotApplicable(f"proportion-as-shipped: needs two classes, got {len(setting.class_counts)}")
    return (1 - setting.class_shares.to(losses))[targets]


_SOURCE = "the baseline of Ren et al., ICML 2018"

PROPORTION = Method(
    "proportion", "weights by inverse class frequency", _SOURCE, always(weighted_step(inverse_share_weights))
)
PROPORTION_AS_SHIPPED = Method(
    "proportion-as-shipped",
    "as in the paper's code: weight 1 - class share, summed without normalising",
    _SOURCE,
    always(weighted_step(opposite_share_weights)),
)
