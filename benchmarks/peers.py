"""Other people's libraries, each in the shortest sequence of passes that its method allows.

They are in the extra `[bench]`; one that is not installed is skipped by name. Every step works on the problem's own
parameters, and leaves the weighted gradient in their `.grad`.
"""

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.cases import Problem, per_example
from benchmarks.providers import Outcome, Step, by_per_example_gradients
from metakern.testing.oracle import clip_normalise


def opacus(problem: Problem) -> Step:
    """Per-example gradients by Opacus' hooks."""
    from opacus.grad_sample import GradSampleModule

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GradSampleModule(_hookable(problem.model), loss_reduction="sum")

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inputs need no gradient, which torch's hooks remark on
            per_example(model(x), y).sum().backward()
        found = {name: param.grad_sample for name, param in problem.model.named_parameters()}
        for param in problem.model.parameters():
            param.grad = param.grad_sample = None
        return found

    return by_per_example_gradients(problem, gradients)


def backpack(problem: Problem) -> Step:
    """Per-example gradients by BackPACK's BatchGrad."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(_hookable(problem.model))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with backpack(BatchGrad()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about layers it has no rule for; looked at below
            loss(model(x), y).backward()
        params = dict(problem.model.named_parameters())
        short = [name for name, param in params.items() if not hasattr(param, "grad_batch")]
        if short:
            raise NotImplementedError(f"leaves out {len(short)} parameters, {short[0]} first")
        found = {name: param.grad_batch for name, param in params.items()}
        for param in params.values():
            del param.grad_batch
            param.grad = None
        return found

    return by_per_example_gradients(problem, gradients)


def higher(problem: Problem) -> Step:
    """A differentiable SGD step on a patched module; the weighted backward reuses the graph of its forward."""
    import higher

    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1.0)

    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        with higher.innerloop_ctx(problem.model, optimizer, copy_initial_weights=False) as (model, inner):
            losses = per_example(model(problem.batch[0]), problem.batch[1])
            eps = torch.zeros_like(losses, requires_grad=True)
            inner.step((eps * losses).sum())
            meta_loss = per_example(model(problem.meta_batch[0]), problem.meta_batch[1]).mean()
            return _by_eps(losses, eps, meta_loss)

    return step


def torchopt(problem: Problem) -> Step:
    """A differentiable SGD step by TorchOpt's functional optimizer; the weighted backward reuses its graph."""
    import torchopt

    params = dict(problem.model.named_parameters())

    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        losses = problem.losses(problem.batch)
        eps = torch.zeros_like(losses, requires_grad=True)
        moved = torchopt.FuncOptimizer(torchopt.sgd(lr=1.0)).step((eps * losses).sum(), tuple(params.values()))
        named = dict(zip(params, moved, strict=True))
        logits = torch.func.functional_call(problem.model, named, (problem.meta_batch[0],))
        return _by_eps(losses, eps, per_example(logits, problem.meta_batch[1]).mean())

    return step


def betty(problem: Problem) -> Step:
    """Betty's finite difference along the meta gradient: two more forward passes, then the weighted backward."""
    from betty.hypergradient.darts import darts

    params = list(problem.model.parameters())
    ones = torch.ones(problem.case.n, device=problem.batch[1].device, requires_grad=True)
    lower = SimpleNamespace(
        config=SimpleNamespace(darts_alpha=0.01),  # its default
        cur_batch=problem.batch,
        trainable_parameters=lambda: params,
        training_step_exec=lambda batch: (ones * problem.losses(batch)).sum(),
    )
    upper = SimpleNamespace(trainable_parameters=lambda: [ones])

    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        direction = torch.autograd.grad(problem.losses(problem.meta_batch).mean(), params)
        before = [param.detach().clone() for param in params]
        (found,) = darts(direction, lower, upper)
        with torch.no_grad():  # release 0.1.1 does not move the parameters back
            torch._foreach_copy_(params, before)
        weights = clip_normalise(-found)
        problem.losses(problem.batch).backward(weights)
        return Outcome(-found, weights)

    return step


def _by_eps(losses: Tensor, eps: Tensor, meta_loss: Tensor) -> Outcome:
    """Dots from the virtual step of learning rate 1, then the weighted backward through the same losses."""
    (found,) = torch.autograd.grad(meta_loss, eps, retain_graph=True)
    weights = clip_normalise(-found)
    losses.backward(weights)
    return Outcome(-found, weights)


def _hookable(model: nn.Module) -> nn.Module:
    """Modules of its own around the same parameters, without in-place activations, which module hooks do not bear."""
    own = copy.deepcopy(model, {id(param): param for param in model.parameters()})
    for module in own.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return own


PEERS: dict[str, Callable[[Problem], Step]] = {
    "opacus": opacus,
    "backpack": backpack,
    "higher": higher,
    "torchopt": torchopt,
    "betty (finite difference)": betty,
}
