"""Reed's bootstrapping: targets mixed with the model's own predictions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from metakern.methods.method import Method, Setting, always
from metakern.methods.weighted_step import weighted_step


def soft_bootstrap_loss(logits: Tensor, targets: Tensor, *, beta: float = 0.95, detach_target: bool = False) -> Tensor:
    """l_n = -sum_k (beta [k == y_n] + (1 - beta) q_n[k]) log q_n[k]; logits[n, C], targets[n] -> [n].

    The second term is the entropy of the prediction, and is differentiated as such. With `detach_target`, its factor q
    is treated as constant.
    Source: Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping", ICLR 2015, equation 6.
    """
    log_q = F.log_softmax(logits, 1)
    q = log_q.exp().detach() if detach_target else log_q.exp()
    return beta * F.nll_loss(log_q, targets, reduction="none") - (1 - beta) * (q * log_q).sum(1)


def hard_bootstrap_loss(logits: Tensor, targets: Tensor, *, beta: float = 0.8) -> Tensor:
    """l_n = -beta log q_n[y_n] - (1 - beta) log q_n[argmax q_n]; logits[n, C], targets[n] -> [n].

    Source: as `soft_bootstrap_loss`, equation 7.
    """
    log_q = F.log_softmax(logits, 1)
    return -beta * log_q.gather(1, targets.unsqueeze(1)).squeeze(1) - (1 - beta) * log_q.amax(1)


def _soft(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return soft_bootstrap_loss(logits, targets)


def _hard(logits: Tensor, targets: Tensor, setting: Setting) -> Tensor:
    return hard_bootstrap_loss(logits, targets)


REED_SOFT = Method(
    "reed-soft",
    "targets mixed with the prediction, beta 0.95",
    "Reed et al., ICLR 2015",
    always(weighted_step(criterion=_soft)),
    handles="noise",
)
REED_HARD = Method(
    "reed-hard",
    "targets mixed with the predicted class, beta 0.8",
    "Reed et al., ICLR 2015",
    always(weighted_step(criterion=_hard)),
    handles="noise",
)
