"""The same meta-steps by other people's libraries, each in the shortest sequence of passes that its method allows.

They are in the extra `[bench]`; one that is not installed is skipped by name. The real step goes backward through the
graph that the virtual one has built.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Problem, losses_of
from benchmarks.meta_steps import RATE, MetaStep, Run, constant, leave_gradient, loss_at

Peer = Callable[[MetaStep, Problem, Any], Run]


def higher(step: MetaStep, problem: Problem, network: Any) -> Run:
    """A differentiable SGD step on a patched module."""
    import higher

    optimizer = torch.optim.SGD(problem.model.parameters(), lr=RATE)

    def run() -> str:
        with higher.innerloop_ctx(problem.model, optimizer, copy_initial_weights=False) as (model, inner):
            outputs = step.outputs(model, problem.batch)
            inner.step(step.loss(outputs, network, problem.batch[1]))
            return _both_gradients(step, problem, network, outputs, losses_of(model, problem.meta_batch).mean())

    return run


def torchopt(step: MetaStep, problem: Problem, network: Any) -> Run:
    """A differentiable SGD step by TorchOpt's functional optimizer."""
    import torchopt

    params = dict(problem.model.named_parameters())

    def run() -> str:
        outputs = step.outputs(problem.model, problem.batch)
        loss = step.loss(outputs, network, problem.batch[1])
        moved = torchopt.FuncOptimizer(torchopt.sgd(lr=RATE)).step(loss, tuple(params.values()))
        meta_loss = loss_at(problem.model, dict(zip(params, moved, strict=True)), problem.meta_batch)
        return _both_gradients(step, problem, network, outputs, meta_loss)

    return run


def betty(step: MetaStep, problem: Problem, network: Any) -> Run:
    """Betty's finite difference along the meta gradient at the virtual parameters: two more forward passes.

    In both the network is asked what it was asked at the present parameters: with the losses of the moved ones the
    difference would be the derivative of another function.
    """
    from betty.hypergradient.darts import darts

    if network is None:
        raise NotImplementedError("not run: without a second network there is nothing to differentiate by")
    params = dict(problem.model.named_parameters())
    asked: list[Tensor] = []
    lower = SimpleNamespace(
        config=SimpleNamespace(darts_alpha=0.01),  # its default
        cur_batch=problem.batch,
        trainable_parameters=lambda: list(params.values()),
        training_step_exec=lambda batch: step.loss(
            step.outputs(problem.model, batch), lambda _: network(asked[0]), batch[1]
        ),
    )
    upper = SimpleNamespace(trainable_parameters=lambda: list(network.parameters()))

    def proposed(given: Tensor) -> Tensor:
        asked[:] = [given]
        return constant(network)(given)

    def run() -> str:
        real_loss = step.loss(step.outputs(problem.model, problem.batch), proposed, problem.batch[1])
        grads = torch.autograd.grad(real_loss, list(params.values()), retain_graph=True)
        before = [param.detach().clone() for param in params.values()]
        moved = {name: (p - RATE * g).requires_grad_() for name, p, g in zip(params, before, grads, strict=True)}
        direction = torch.autograd.grad(loss_at(problem.model, moved, problem.meta_batch), list(moved.values()))
        found = darts(direction, lower, upper)
        for param, value in zip(params.values(), before, strict=True):  # release 0.1.1 does not move them back
            param.data.copy_(value)  # by `data`: the graph of the real loss is still to be gone through
        leave_gradient(network, tuple(RATE * grad for grad in found))
        real_loss.backward()
        return "finite difference"

    return run


def _both_gradients(step: MetaStep, problem: Problem, network: Any, outputs: Tensor, meta_loss: Tensor) -> str:
    """Backward from the meta loss, and where there is a second network from the real loss, through the same outputs."""
    if network is None:
        meta_loss.backward()
    else:
        leave_gradient(network, torch.autograd.grad(meta_loss, list(network.parameters()), retain_graph=True))
        step.loss(outputs, constant(network), problem.batch[1]).backward()
    return "double_backward"


META_PEERS: dict[str, Peer] = {"higher": higher, "torchopt": torchopt, "betty (finite difference)": betty}
