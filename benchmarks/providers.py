"""A whole re-weighted step by each way there is in PyTorch itself; all leave the same weighted gradient in `.grad`.

No optimizer step is included: it costs the same for everybody. Each way but the published one is written as well as we
can: the shortest sequence of passes that its method allows. Other people's libraries are in `peers`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import metakern
from benchmarks.cases import Batch, Problem, per_example
from metakern.testing.oracle import clip_normalise

WARM_UP = 3
"""Steps before a capture, in which the libraries choose their kernels."""
ONE_GIGABYTE = 2**30
LARGEST = 8 * ONE_GIGABYTE
"""Of per-example gradients: above it a step by vmap takes minutes on a CPU, in whatever chunks."""


@dataclass(frozen=True)
class Outcome:
    """What a step found out; None where it does not."""

    dots: Tensor | None = None
    weights: Tensor | None = None
    engine: str = ""
    dot_precision: str = "same"  # what the dots were allowed to be rounded to


Step = Callable[[], Outcome]
Function = Callable[..., Any]


def plain(problem: Problem) -> Step:
    """The unit: forward, mean loss, backward."""

    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        problem.losses(problem.batch).mean().backward()
        return Outcome()

    return step


def ours(problem: Problem, **settings: Any) -> Step:
    """metakern.l2rw_step with these settings."""

    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        result = metakern.l2rw_step(problem.model, problem.batch, problem.meta_batch, **settings)
        return Outcome(result.dots, result.weights, result.engine)

    return step


def ours_rounded(problem: Problem) -> Step:
    """metakern.l2rw_step, the products behind the dots in bfloat16."""
    step = ours(problem, dot_precision="bf16")
    return lambda: replace(step(), dot_precision="bf16")


def plain_compiled(problem: Problem) -> Step:
    """The unit by torch.compile: forward and mean loss as one function, and the backward that comes of it."""
    mean_loss = torch.compile(lambda x, y: per_example(problem.model(x), y).mean(), dynamic=False)

    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        mean_loss(*problem.batch).backward()
        return Outcome(weights=_alike(problem))

    return step


def ours_compiled(problem: Problem) -> Step:
    """metakern.compile_step."""
    return _prepared(problem, metakern.compile_step(problem.model, problem.batch, problem.meta_batch))


def plain_captured(problem: Problem) -> Step:
    """The unit as one CUDA graph, whose gradients stay where they are."""
    _require_cuda()
    run, stream = plain(problem), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    gradient = {param: param.grad for param in _params(problem).values()}

    def step() -> Outcome:
        graph.replay()
        for param, grad in gradient.items():  # another way may have taken it away
            param.grad = grad
        return Outcome(weights=_alike(problem))

    return step


def ours_captured(problem: Problem) -> Step:
    """metakern.capture_step."""
    _require_cuda()
    return _prepared(problem, metakern.capture_step(problem.model, problem.batch, problem.meta_batch))


def _prepared(problem: Problem, prepared: Callable[[Batch, Batch], metakern.StepResult]) -> Step:
    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        result = prepared(problem.batch, problem.meta_batch)
        return Outcome(result.dots, result.weights, result.engine)

    return step


def _alike(problem: Problem) -> Tensor:
    """The weights of a plain step, by which its gradient is checked."""
    return torch.full((problem.case.n,), 1 / problem.case.n, device=problem.batch[1].device)


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        raise NotImplementedError("not run: needs CUDA")


def ours_by_quarters(problem: Problem) -> Step:
    """metakern.l2rw_step, a quarter of the batch at a time."""
    return ours(problem, micro_batch=max(1, problem.case.n // 4))


def double_backward_as_published(
    problem: Problem, attention: Callable[[], AbstractContextManager] = nullcontext
) -> Step:
    """The sequence of the released codes of Ren et al. and their PyTorch ports.

    A virtual step that is differentiable in eps, from eps = 0; the meta loss at the virtual parameters; its gradient
    with respect to eps; then a fresh forward and backward of the weighted losses. What those codes also do and need
    not, copying the network into a second one, is left out.
    """
    params = _params(problem)

    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        with attention():
            losses = problem.losses(problem.batch)
            eps = torch.zeros_like(losses, requires_grad=True)
            grads = torch.autograd.grad((eps * losses).sum(), list(params.values()), create_graph=True)
            # Virtual learning rate 1: at eps = 0 it is a factor of the dots, and cancels in the weights.
            moved = {name: p - g for (name, p), g in zip(params.items(), grads, strict=True)}
            logits = torch.func.functional_call(problem.model, moved, (problem.meta_batch[0],))
            (found,) = torch.autograd.grad(per_example(logits, problem.meta_batch[1]).mean(), eps)
        weights = clip_normalise(-found)
        problem.losses(problem.batch).backward(weights)
        return Outcome(-found, weights)

    return step


def double_backward(problem: Problem, attention: Callable[[], AbstractContextManager] = nullcontext) -> Step:
    """Differentiate the gradient again: dots = d<sum_n u_n g_n, v>/du; then one backward of the weighted losses."""
    params = _params(problem)

    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        direction = torch.autograd.grad(problem.losses(problem.meta_batch).mean(), list(params.values()))
        with attention():
            losses = problem.losses(problem.batch)
            ones = torch.ones_like(losses, requires_grad=True)
            grads = torch.autograd.grad(losses, list(params.values()), ones, create_graph=True)
            along = torch.stack([(g * v).sum() for g, v in zip(grads, direction, strict=True)]).sum()
            (dots,) = torch.autograd.grad(along, ones, retain_graph=True)
        weights = clip_normalise(dots)
        losses.backward(weights)
        return Outcome(dots, weights)

    return step


def _as_it_is(function: Function) -> Function:
    return function


def _compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)


def jvp(
    problem: Problem,
    attention: Callable[[], AbstractContextManager] = nullcontext,
    made: Callable[[Function], Function] = _as_it_is,
) -> Step:
    """Forward mode along v by torch.func.jvp, then a plain forward and backward of the weighted losses."""
    params = _params(problem)

    def losses_at(values: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(problem.model, values, (problem.batch[0],))
        return per_example(logits, problem.batch[1])

    @made
    def along(values: dict[str, Tensor], direction: dict[str, Tensor]) -> Tensor:
        return torch.func.jvp(losses_at, (values,), (direction,))[1]

    losses = made(problem.losses)

    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        direction = torch.autograd.grad(losses(problem.meta_batch).mean(), list(params.values()))
        values = {name: param.detach() for name, param in params.items()}
        with attention(), torch.no_grad():
            dots = along(values, dict(zip(params, direction, strict=True)))
        weights = clip_normalise(dots)
        losses(problem.batch).backward(weights)
        return Outcome(dots, weights)

    return step


PerExample = Callable[[Tensor, Tensor], dict[str, Tensor]]


def by_per_example_gradients(problem: Problem, gradients: PerExample) -> Step:
    """Dots from per-example gradients [n, ...]; their weighted sum where they all fit in one gigabyte, else in chunks.

    Chunks are dropped after their dots, so that the weighted gradient then takes a forward and backward of its own.
    """
    params = _params(problem)
    size = sum(param.numel() * param.element_size() for param in params.values())
    if problem.case.n * size > LARGEST:
        raise NotImplementedError(f"not run: per-example gradients of {problem.case.n * size / ONE_GIGABYTE:.0f} GB")
    chunk = max(1, min(problem.case.n, ONE_GIGABYTE // size))

    def step() -> Outcome:
        problem.model.zero_grad(set_to_none=True)
        found = torch.autograd.grad(problem.losses(problem.meta_batch).mean(), list(params.values()))
        direction = dict(zip(params, found, strict=True))
        parts, grads = [], {}
        for x, y in zip(problem.batch[0].split(chunk), problem.batch[1].split(chunk), strict=True):
            grads.clear()
            grads.update(gradients(x, y))
            # A matrix-vector product would be quicker, and fails the check: its float32 sums are too long.
            parts.append(sum((grads[name] * direction[name]).flatten(1).sum(1) for name in params))
        dots = torch.cat(parts)
        weights = clip_normalise(dots)
        if chunk == problem.case.n:
            for name, param in params.items():
                param.grad = (weights.to(param.dtype) @ grads[name].flatten(1)).view_as(param)
        else:
            grads.clear()
            problem.losses(problem.batch).backward(weights)
        return Outcome(dots, weights)

    return step


def vmap(problem: Problem, made: Callable[[Function], Function] = _as_it_is) -> Step:
    """Per-example gradients by torch.func.vmap(grad)."""
    params = _params(problem)

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(problem.model, values, (x.unsqueeze(0),))
        return per_example(logits, y.unsqueeze(0)).squeeze(0)

    gradients = made(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0)))
    values = {name: param.detach() for name, param in params.items()}
    return by_per_example_gradients(problem, lambda x, y: gradients(values, x, y))


def _math() -> AbstractContextManager:
    return sdpa_kernel(SDPBackend.MATH)


def _params(problem: Problem) -> dict[str, torch.nn.Parameter]:
    return {name: param for name, param in problem.model.named_parameters() if param.requires_grad}


PROVIDERS: dict[str, Callable[[Problem], Step]] = {
    "plain": plain,
    "double_backward (published)": double_backward_as_published,
    "double_backward (short)": double_backward,
    "vmap": vmap,
    "jvp": jvp,
    "metakern": ours,
    "metakern two_pass": partial(ours, memory="two_pass"),
    "metakern micro_batch=n/4": ours_by_quarters,
}

# Inductor takes half a minute or more for each, so they are measured where they are asked for only.
COMPILED_PROVIDERS: dict[str, Callable[[Problem], Step]] = {
    "plain compiled": plain_compiled,
    "metakern compiled": ours_compiled,
}

COMPILED_PEERS: dict[str, Callable[[Problem], Step]] = {
    "vmap compiled": partial(vmap, made=_compiled),
    "jvp compiled": partial(jvp, made=_compiled),
}

# On a GPU, for steps of many short kernels.
CAPTURED_PROVIDERS: dict[str, Callable[[Problem], Step]] = {
    "plain captured": plain_captured,
    "metakern captured": ours_captured,
}

ROUNDED_PROVIDERS: dict[str, Callable[[Problem], Step]] = {"metakern bf16 dots": ours_rounded}

# What a user of fused attention can do instead, where the peers above stop: switch to its plain form, which can be
# differentiated twice and forwards.
FUSED_PROVIDERS: dict[str, Callable[[Problem], Step]] = {
    "double_backward (published, math)": partial(double_backward_as_published, attention=_math),
    "double_backward (short, math)": partial(double_backward, attention=_math),
    "jvp (math)": partial(jvp, attention=_math),
}
