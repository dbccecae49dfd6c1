"""The dual level in which tangents are computed, where torch's own forward mode falls short."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.utils.parametrizations import weight_norm

import metakern
from metakern.layers.forward.forward_mode import dual_level
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, judge_step


def test_group_norm_of_channels_last() -> None:
    x, tangent, weight = inputs.normal(3, 8, 5, 5, seed=1), inputs.normal(3, 8, 5, 5, seed=2), inputs.normal(8, seed=3)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for call in (F.group_norm, torch.group_norm, partial(torch.group_norm, cudnn_enabled=False)):
            for named in (False, True):
                with dual_level():
                    dual = forward_ad.make_dual(*(value.to(memory_format=layout) for value in (x, tangent)))
                    out = call(num_groups=4, weight=weight, input=dual) if named else call(dual, 4, weight)
                    found.append(forward_ad.unpack_dual(out).tangent)
    for other in found[1:]:
        budget.assert_within(other, found[0], 10.0)


def test_logit_tangents_of_a_channels_last_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).double()
    batch, meta_batch = ((inputs.normal(n, 3, 6, 6, seed=n), inputs.labels(n, classes=4, seed=n + 1)) for n in (6, 4))
    plain = metakern.logit_tangents(model, batch, meta_batch)
    turned = metakern.logit_tangents(model.to(memory_format=torch.channels_last), batch, meta_batch)
    budget.assert_within(turned.tangents, plain.tangents, 100.0)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_normalisation_beneath_batch_normalisation(dim: int | None) -> None:
    torch.manual_seed(0)
    layers = weight_norm(nn.Linear(4, 5), dim=dim), nn.BatchNorm1d(5), nn.Tanh(), weight_norm(nn.Linear(5, 3), dim=dim)
    setup = Setup(nn.Sequential(*layers).double(), *inputs.pair(6, 4, 4, classes=3), interacting=True)
    judge_step(metakern.l2rw_step, setup)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_normalisation_by_running_statistics_under_autocast(norm: type[nn.BatchNorm1d]) -> None:
    """Of half-precision activations by weights in float32: the tangent is of one dtype with the output."""
    torch.manual_seed(0)
    body = nn.Conv1d(2, 4, 2), norm(4, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(16, 3)
    setup = Setup(nn.Sequential(*body).eval(), *inputs.pair(6, 3, 2, 5, classes=3, dtype=torch.float32))
    truth = setup.oracle()
    with torch.autocast("cpu", torch.bfloat16):
        plain = setup.oracle(dtype=torch.float32)
        dots = metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, engine="jvp", memory="two_pass").dots
    scale = truth.example_norms * truth.meta_norm
    lost = float(((plain.dots.double() - truth.dots).abs() / scale).max())
    found = budget.verdict("dots", dots, truth.dots, (2 * lost + 8 * torch.finfo(torch.bfloat16).eps) * scale)
    assert found.ok, str(found)


def test_gradient_penalty_of_a_cross_entropy() -> None:
    """torch's forward mode of its backward pass is made of operators of its own."""

    def penalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].detach().requires_grad_()
        with torch.enable_grad():
            losses = F.cross_entropy(model(x), batch[1], reduction="none")
            (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return losses + slope.square().sum(1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    setup = Setup(model, *inputs.pair(6, 3, 4, classes=3), loss_fn=penalised)
    assert judge_step(metakern.l2rw_step, setup).result.engine == "jvp"


def test_logcumsumexp_of_numbers_far_apart() -> None:
    """Sums from the first entry on, whose exponentials vanish beside that of the last."""
    x, tangent = torch.linspace(-60, 0, 7, dtype=torch.float64), inputs.normal(7, seed=2)
    with dual_level():
        found = forward_ad.unpack_dual(forward_ad.make_dual(x, tangent).logcumsumexp(0)).tangent
    shares = (x - torch.logcumsumexp(x, 0).unsqueeze(1)).exp().tril()
    budget.assert_within(found, shares @ tangent, tangent.abs().max())


class Experts(nn.Module):
    """Tokens sorted by the expert that they are routed to, as mixtures of experts in transformers compute them; torch
    has these products in single precision and below, so the oracle goes expert by expert.
    """

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.route, self.head, self.transposed = nn.Linear(4, 3), nn.Linear(8, 3), transposed
        self.weight = nn.Parameter(inputs.normal(3, *((8, 4) if transposed else (4, 8)), seed=5))

    def forward(self, x: Tensor) -> Tensor:
        score, expert = self.route(x).flatten(0, 1).softmax(1).max(1)
        order = expert.argsort(stable=True)
        counts = expert.bincount(minlength=3)
        tokens, weight = x.flatten(0, 1)[order], self.weight.transpose(1, 2) if self.transposed else self.weight
        if tokens.dtype == torch.float64:
            hidden = torch.cat([rows @ w for rows, w in zip(tokens.split(counts.tolist()), weight)])
        else:
            hidden = F.grouped_mm(tokens, weight, offs=counts.cumsum(0).int())
        hidden = torch.empty_like(hidden).index_copy(0, order, hidden) * score.unsqueeze(1)
        return self.head(torch.tanh(hidden).view(*x.shape[:2], 8).mean(1))


@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_experts(transposed: bool) -> None:
    torch.manual_seed(0)
    setup = Setup(Experts(transposed).float(), *inputs.pair(6, 4, 5, 4, classes=3, dtype=torch.float32))
    judgement = judge_step(metakern.l2rw_step, setup, plain=setup.oracle(dtype=torch.float32))
    assert judgement.result.engine == "jvp"


@torch.library.custom_op("metakern_test::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """x * weight as an operator whose derivative is written in Python: forward mode would lose its tangent."""
    return x * weight


def _scaled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return grad * weight, (grad * x).sum(0)


scaled.register_autograd(_scaled_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Scaled(nn.Module):
    """The operator, or a branch of torch.cond, between two layers."""

    def __init__(self, norm: nn.Module, branches: bool = False, within: Any = nullcontext) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 5), norm, nn.Linear(5, 3)
        self.weight, self.branches = nn.Parameter(torch.linspace(0.5, 1.5, 5)), branches
        self.within = within

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        if self.branches:
            return self.head(
                torch.cond(torch.tensor(True), lambda h: (h.tanh(),), lambda h: (h.relu(),), (hidden * self.weight,))[0]
            )
        with self.within():
            product = scaled(hidden, self.weight)
        return self.head(hidden + product)


def scaled_setup(model: nn.Module) -> Setup:
    torch.manual_seed(0)
    return Setup(model.double(), *inputs.pair(6, 4, 4, classes=3), interacting=True)


def test_custom_operator_on_a_parameter() -> None:
    assert judge_step(metakern.l2rw_step, scaled_setup(Scaled(nn.LayerNorm(5)))).result.engine == "ghost"


def test_custom_operator_whose_forward_mode_is_that_of_its_backward_pass() -> None:
    setup = scaled_setup(Scaled(nn.BatchNorm1d(5)))
    assert judge_step(metakern.l2rw_step, setup).result.engine == "jvp"
    judge_step(metakern.l2rw_step, setup, engine="double_backward")


@pytest.mark.parametrize(("norm", "engine"), [(nn.LayerNorm, "ghost"), (nn.BatchNorm1d, "jvp")])
def test_custom_operator_where_subclasses_are_disabled(norm: Any, engine: str) -> None:
    """As in the `__torch_function__` of a subclass; there torch 2.14 calls it past function modes."""
    call = OpOverload.__call__
    setup = scaled_setup(Scaled(norm(5), within=torch._C.DisableTorchFunctionSubclass))
    assert judge_step(metakern.l2rw_step, setup).result.engine == engine
    assert OpOverload.__call__ is call


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_branches_that_are_operators() -> None:
    """Neither tangents nor second derivatives come out of torch.cond, and torch does not say so."""
    judge_step(metakern.l2rw_step, scaled_setup(Scaled(nn.LayerNorm(5), branches=True)), engine="ghost")
    setup = scaled_setup(Scaled(nn.BatchNorm1d(5), branches=True))
    refused(setup, "auto", r"operator cond has no forward mode")
    refused(setup, "double_backward", r"operator cond cannot be differentiated again")
    with pytest.raises(NotImplementedError, match=r"operator cond cannot be differentiated again"):
        metakern.metabalance_step(setup.model, setup.batch, setup.meta_batch, inner_lr=0.1)


def refused(setup: Setup, engine: str, message: str) -> None:
    before = Snapshot.of(setup.model)
    with pytest.raises(NotImplementedError, match=message):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine=engine)
    before.assert_unchanged(setup.model)


def rows(x: Tensor) -> Tensor:
    """Three groups, taken in turn."""
    return (torch.arange(len(x)) % 3)[:, None].expand_as(x)


class Grouped(nn.Module):
    """Reduces features, many of them zero, over groups of examples."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        return self.second(hidden + self.reduce(hidden)[rows(x)[:, 0]])


def scattered(reduce: str, **settings: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_ones(3, 8).scatter_reduce(0, rows(x), x, reduce, **settings)


@pytest.mark.parametrize(
    "reduce",
    [
        scattered("amax", include_self=False),
        scattered("amin", include_self=False),
        scattered("amax"),
        scattered("mean", include_self=False),
        lambda x: x.new_zeros(3, 8).scatter_reduce_(0, rows(x), x.cos(), "amax", include_self=False),
        lambda x: torch.scatter_reduce(2 * x[:3], 0, rows(x), src=x, reduce="amin", include_self=False),
        lambda x: x.prod(0, keepdim=True).expand(3, 8),
        lambda x: x.cumprod(0)[:3],
    ],
)
def test_reductions_over_groups_with_zeros(reduce: Callable[[Tensor], Tensor]) -> None:
    setup = scaled_setup(Grouped(reduce))
    found = [metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, engine=engine).dots for engine in ENGINES]
    budget.assert_within(found[0], found[1], 100 * found[1].abs().max())


ENGINES = ("jvp", "double_backward")


@pytest.mark.parametrize(
    "reduce",
    [
        scattered("prod"),
        lambda x: torch.scatter_reduce(x[:3], 0, rows(x), x.detach(), reduce="prod"),
        lambda x: x.new_ones(3, 8).scatter_reduce_(0, rows(x), x, "prod"),
        lambda x: x.new_ones(3, 8).index_reduce(0, rows(x)[:, 0], x, "prod"),
    ],
)
@pytest.mark.filterwarnings("ignore:index_reduce")
def test_products_over_groups_are_refused(reduce: Callable[[Tensor], Tensor]) -> None:
    """Torch's forward mode loses their tangents without a word."""
    setup = scaled_setup(Grouped(reduce))
    refused(setup, "jvp", r"_reduce.* forward mode|forward.*_reduce.*engine='double_backward'")


def test_products_of_constants_are_not_refused() -> None:
    setup = scaled_setup(Grouped(lambda x: scattered("prod")(x.detach().cos())))
    judge_step(metakern.l2rw_step, setup, engine="jvp")


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "prelu": lambda x: F.prelu(x, x.new_tensor([0.3])),
    "prelu of channels": lambda x: x.prelu(torch.linspace(0.1, 0.5, 8, dtype=x.dtype)),
    "fmax": lambda x: torch.fmax(x, -2 * x),
    "fmin": lambda x: x.fmin(-2 * x),
    "amax": lambda x: x.new_zeros(3, 8).scatter_reduce(0, rows(x), x, "amax", include_self=False),
    "amin": lambda x: x.new_zeros(3, 8).scatter_reduce_(0, rows(x), x, "amin", include_self=False),
}


@pytest.mark.parametrize("kink", KINKS)
def test_slopes_at_kinks_are_those_of_a_backward_pass(kink: str) -> None:
    """Features that are exactly zero with a tangent that is not."""
    x, tangent = inputs.normal(5, 8, seed=1), inputs.normal(5, 8, seed=2)
    x[:2] = 0
    with dual_level():
        found = forward_ad.unpack_dual(KINKS[kink](forward_ad.make_dual(x, tangent))).tangent
    rows = torch.autograd.functional.jacobian(KINKS[kink], x)  # type: ignore[arg-type]
    budget.assert_within(found, (rows * tangent).sum((-1, -2)), 10.0)


class LargeVocabulary(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), norm
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.first(x)))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has no linear_cross_entropy")
@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
def test_cross_entropy_in_parts(engine: str) -> None:
    """In parts it is an operator that loses tangents without a word, and has no second derivative."""

    def in_parts(model: Any, batch: Any) -> Tensor:
        parts = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
        return F.linear_cross_entropy(model(batch[0]), model.head.weight, batch[1], reduction="none", options=parts)

    setup = scaled_setup(LargeVocabulary(nn.LayerNorm(8)))
    judge_step(metakern.l2rw_step, Setup(setup.model, setup.batch, setup.meta_batch, loss_fn=in_parts), engine=engine)


def test_a_pass_within_a_pass_says_so() -> None:
    """A loss that asks for the dots of another model by forward mode; torch has one level of it."""
    model, inner = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    batch, meta = inputs.pair(6, 4, 4, classes=3)

    def losses(model: nn.Module, some: Any) -> Tensor:
        factor = metakern.grad_dots(inner, some, some, engine="jvp").dots.detach()
        return F.cross_entropy(model(some[0]), some[1], reduction="none") * factor

    with pytest.raises(NotImplementedError, match="forward mode"):
        metakern.l2rw_step(model, batch, meta, loss_fn=losses, engine="jvp")
    assert metakern.l2rw_step(model, batch, meta, loss_fn=losses, engine="double_backward").dots.isfinite().all()
