"""From the losses of a batch, by a weight net: coefficients of the virtual step, and weights of the real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.host import finite_sum
from metakern.step.meta_network import ask

NORMALISATIONS = ("sum", "detached_sum", "mean", "none")


@dataclass(frozen=True)
class Weighting:
    """w_n = weight_net(l_n, features_n) and G(l) = sum_n w_n l_n / S, where S depends on `normalise`.

    S is sum_n w_n ("sum"), the same treated as a constant ("detached_sum"), n ("mean") or 1 ("none").
    """

    weight_net: nn.Module
    normalise: str
    detach_losses: bool

    def coefficients(self, losses: Tensor, features: tuple[Any, ...]) -> Tensor:
        """c_n = dG/dl_n, [n], with a graph through the weight net and nothing else.

        Without `detach_losses`, the losses enter the weight net as variables, and c includes dw/dl.
        """
        leaf = _at_least_float32(losses).requires_grad_()
        with torch.enable_grad():
            raw = self._raw(leaf.detach() if self.detach_losses else leaf, features)
            if not raw.requires_grad:
                raise ValueError("weight_net: its output does not depend on any parameter with requires_grad=True")
            total = (self._normalised(raw) * leaf).sum()
            (found,) = torch.autograd.grad(total, leaf, create_graph=True)
        return found

    @torch.no_grad()
    def weights(self, losses: Tensor, features: tuple[Any, ...]) -> Tensor:
        """w_n / S, [n]."""
        return self._normalised(self._raw(_at_least_float32(losses), features))

    def _raw(self, losses: Tensor, features: tuple[Any, ...]) -> Tensor:
        output = ask(self.weight_net, losses.unsqueeze(1), features)
        n = losses.shape[0]
        if not isinstance(output, Tensor) or tuple(output.shape) not in ((n,), (n, 1)):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"weight_net must return one weight per example, shape ({n},) or ({n}, 1); got {got}")
        if not finite_sum(output):
            raise ValueError("weight_net returned weights that are not finite; nothing was changed")
        return output.reshape(n)

    def _normalised(self, raw: Tensor) -> Tensor:
        if self.normalise == "none":
            return raw
        if self.normalise == "mean":
            return raw / raw.shape[0]
        total = raw.sum() if self.normalise == "sum" else raw.sum().detach()
        return raw / (total + (total == 0).to(total.dtype))


def _at_least_float32(losses: Tensor) -> Tensor:
    losses = losses.detach()
    return losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses.clone()
