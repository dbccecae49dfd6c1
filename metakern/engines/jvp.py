"""Forward mode: dots_n = d/dr l_n(theta + r V), one dual pass through the whole model.

Exact also if examples interact (batch statistics, graphs, contrastive losses). It costs the two products per layer that
make its tangents. Fused attention has no forward mode, and is replaced by its unfused form in that pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from metakern.capture.function import only_watches
from metakern.capture.host import host_may_wait
from metakern.capture.losses import evaluate_losses
from metakern.capture.members import modules_of, name_of
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.repeatable import repeatable_layers
from metakern.capture.state.passes import PassState
from metakern.engines.agreement import expected
from metakern.engines.problem import Problem
from metakern.engines.products import Products, ReusedProducts
from metakern.engines.recorded import Names
from metakern.engines.repetition import require_repetition
from metakern.engines.substitution import require_replaced, substituted
from metakern.engines.train_pass import GraphPass
from metakern.layers.forward.forward_mode import dual_level, lacks_forward_mode

PLAIN_ATTENTION = partial(sdpa_kernel, SDPBackend.MATH)
"""The context of passes in forward mode; their backward passes need it too, for checkpointed layers."""


class DualPass(GraphPass):
    """Dots by forward mode, in a second forward pass with the random numbers and buffers of the first.

    Raises:
        EngineUnavailable: an operation of the model has no forward mode; without a check of the first pass, by `dots`.
    """

    form = staticmethod(PLAIN_ATTENTION)

    def __init__(self, problem: Problem) -> None:
        self._start = PassState(problem.model, problem.loss_fn, problem.writes)
        # Fused attention draws its dropout mask differently, so the pass that is differentiated is unfused as well.
        with first_pass(problem) as self._products:
            losses = problem.batch_losses()
        super().__init__(problem, losses)
        require_forward_mode(problem, losses, self._start, self._products)
        problem.require_reached(losses)

    def weighted_gradient(self, weights: Tensor, keep: bool = False, only: Names | None = None) -> dict[str, Tensor]:
        if not keep:  # the pass is over, and its products would add to the memory of the backward pass
            del self._products, self._start
        return super().weighted_gradient(weights, keep, only)

    def dots(self, direction: Mapping[str, Tensor]) -> Tensor:
        return loss_tangents(self._problem, dict(direction), self._start, self.losses, self._products)


class _Hooks(TorchFunctionMode):
    """Records whether a hook that may change gradients was registered on a tensor."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook:
            self.seen |= not only_watches(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def first_pass(problem: Problem) -> Iterator[Products]:
    """The pass that a dual pass repeats, made of operations that have a forward mode; yields its products, which
    memory="two_pass" does not keep.

    Raises: EngineUnavailable if hooks may change gradients in the backward pass, which forward mode would not see.
    """
    hooks, products = _Hooks(), Products()
    with ExitStack() as stack:
        for context in (PLAIN_ATTENTION(), repeatable_layers(problem.model), hooks):
            stack.enter_context(context)
        if problem.memory == "reuse":
            stack.enter_context(products)
        yield products
    hooked = next((module for module in modules_of(problem.model) if _has_backward_hooks(module)), None)
    everywhere = module_hooks._global_backward_hooks or module_hooks._global_backward_pre_hooks
    if hooks.seen or everywhere or hooked is not None:
        name = None if hooked is None else name_of(problem.model, hooked)
        where = "a tensor" if name is None else f"module '{name}'" if name else "the model"
        raise EngineUnavailable(
            f"{'every module' if everywhere else where} has a backward hook, which may change gradients; forward mode "
            "would not see that: remove it, or use engine='double_backward'"
        )


def _has_backward_hooks(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def require_forward_mode(problem: Problem, outputs: Tensor, start: PassState, products: Products) -> None:
    """Raise EngineUnavailable if the first tangents of a model disagree with a backward pass; `outputs` are those of
    the first pass, with its graph.
    """
    held = expected(problem, outputs, ("jvp", outputs.dim()), PLAIN_ATTENTION)
    if held is not None:
        held.require_dots(loss_tangents(problem, held.direction, start, outputs.detach(), products))


def loss_tangents(
    problem: Problem, direction: dict[str, Tensor], start: PassState, values: Tensor, products: Products
) -> Tensor:
    """d/dr l_n(theta + r V), [n]; the parameters are not touched. `start`, `values` and `products` are those of the
    first pass: the state it started from, so that dropout masks are the same, its losses, and its products.

    Raises: EngineUnavailable: an operation has no forward mode, or this pass does not repeat the first.
    """
    reused = ReusedProducts(products)
    with start.replayed():
        tangents = _dual_pass(problem, direction, values, reused)
    if host_may_wait() and not reused.agreed():
        with start.replayed():
            tangents = _dual_pass(problem, direction, values, nullcontext())
    return tangents


def _dual_pass(
    problem: Problem, direction: dict[str, Tensor], values: Tensor, reused: AbstractContextManager[Any]
) -> Tensor:
    try:
        with ExitStack() as stack:
            fused = _without_fused_encoder(), without_fused_lstm(problem.model)
            for context in (dual_level(), PLAIN_ATTENTION(), *fused):
                stack.enter_context(context)
            duals = {id(p): p.detach() for p in problem.trainable.values()}
            for name, v in direction.items():
                duals[id(problem.chosen[name])] = forward_ad.make_dual(problem.chosen[name].detach(), v)
            stack.enter_context(reused)  # below the next, so that it sees dual parameters wherever they are held
            stack.enter_context(substituted(problem.model, duals))
            losses = evaluate_losses(problem.model, problem.batch, problem.loss_fn, "batch")
            found = forward_ad.unpack_dual(losses)
            _require_all_dual(problem, found.primal)
            require_repetition(found.primal.detach(), values)
            return torch.zeros_like(values) if found.tangent is None else found.tangent.detach().clone()
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, EngineUnavailable) or not lacks_forward_mode(error):
            raise
        raise EngineUnavailable(
            f"an operation of the model has no forward mode ({str(error).splitlines()[0]}); engine='double_backward' "
            "may be exact, at several times the cost"
        ) from error


def _require_all_dual(problem: Problem, losses: Tensor) -> None:
    """Raise if a parameter itself took part; dual ones require no gradient."""
    if losses.requires_grad:
        parameters = list(problem.trainable.values())
        require_replaced(
            problem.trainable, torch.autograd.grad(losses, parameters, torch.ones_like(losses), allow_unused=True)
        )


@contextmanager
def _without_fused_encoder() -> Iterator[None]:
    """Without gradients, nn.TransformerEncoderLayer uses a fused path in eval mode, which has no forward mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def without_fused_lstm(model: nn.Module) -> Iterator[None]:
    """oneDNN's LSTM has no forward mode, and its backward pass cannot be compiled; setting and restoring its flags
    warns about Intel GPUs.
    """
    if not any(isinstance(module, nn.LSTM) for module in modules_of(model)):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield
