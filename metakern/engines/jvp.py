"""Forward mode: dots_n = d/dr l_n(theta + r V), one dual pass through the whole model.

Exact also where examples interact (batch statistics, graphs, contrastive losses). It costs an extra forward with
tangents, and fused attention is replaced by its plain form for that pass, since it has no forward mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakern.capture.losses import evaluate_losses
from metakern.capture.random_state import random_state, restore_random_state
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state import Buffers
from metakern.engines.group import mean_over_group
from metakern.engines.packing import PackingByParts
from metakern.engines.problem import Answer, Problem
from metakern.engines.substitution import substituted
from metakern.engines.weighted_backward import weighted_backward
from metakern.layers.replay import dual_level, lacks_forward_mode


def solve(problem: Problem) -> Answer:
    """Dots by one dual pass; the weighted gradient by a plain backward of the weighted losses.

    Raises:
        EngineUnavailable: an operation of the model has no forward mode.
    """
    before, state = Buffers(problem.model), random_state()
    # Fused attention draws its dropout mask in another way, so the pass that is differentiated uses the plain form too.
    with sdpa_kernel(SDPBackend.MATH):
        losses = problem.batch_losses()
    meta_loss, direction = problem.meta_gradient()
    mean_over_group(direction, problem.process_group)
    after = random_state()
    restore_random_state(state)  # the dual pass draws the dropout masks of the pass it belongs to
    with before.replayed():
        dots = loss_tangents(problem, direction)
    restore_random_state(after)
    return Answer(dots, losses.detach(), meta_loss, lambda weights: weighted_backward(problem, losses, weights))


def loss_tangents(problem: Problem, direction: dict[str, Tensor]) -> Tensor:
    """d/dr l_n(theta + r V), [n]; the parameters are not touched."""
    try:
        with ExitStack() as stack:
            for context in (torch.no_grad(), dual_level(), sdpa_kernel(SDPBackend.MATH), PackingByParts()):
                stack.enter_context(context)
            stack.enter_context(_without_fused_encoder())
            if any(isinstance(module, nn.LSTM) for module in problem.model.modules()):
                stack.enter_context(_without_fused_lstm())
            duals = {
                id(problem.chosen[name]): forward_ad.make_dual(problem.chosen[name].detach(), v)
                for name, v in direction.items()
            }
            stack.enter_context(substituted(problem.model, duals))
            losses = evaluate_losses(problem.model, problem.batch, problem.loss_fn, "batch")
            tangent = forward_ad.unpack_dual(losses).tangent
            return torch.zeros_like(losses) if tangent is None else tangent.clone()
    except (NotImplementedError, RuntimeError) as error:
        if not lacks_forward_mode(error):
            raise
        raise EngineUnavailable(
            f"an operation of the model has no forward mode ({str(error).splitlines()[0]})"
        ) from error


@contextmanager
def _without_fused_encoder() -> Iterator[None]:
    """Without gradients nn.TransformerEncoderLayer takes a fused path in eval mode, which has no forward mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _without_fused_lstm() -> Iterator[None]:
    """oneDNN's LSTM has no forward mode; entering and leaving its flags warns about Intel GPUs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield
