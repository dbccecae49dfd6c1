"""batchnorm="frozen": dots of the model whose batch statistics are constants, gradient of the model itself."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup, randomise
from metakern.testing.judge import Snapshot, gradients


def setup_of(*, affine: bool = True, tracked: bool = True, momentum: float | None = 0.1) -> Setup:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=affine, track_running_stats=tracked, momentum=momentum)),
        *(nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
    )
    randomise(model)
    return Setup(model.double(), *inputs.pair(7, 4, 2, 5, 5, classes=3), interacting=True)


def with_constant_statistics(setup: Setup) -> nn.Module:
    """A copy in eval mode whose running statistics are those of the train batch."""
    model = copy.deepcopy(setup.model).train()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = True
        width = norm.num_features
        norm.running_mean, norm.running_var = torch.zeros(width).double(), torch.ones(width).double()
        norm.register_forward_pre_hook(_take)
    model(setup.batch[0])
    return model.eval()


def _take(norm: Any, args: tuple[Tensor]) -> None:
    if norm.training:
        across = [d for d in range(args[0].dim()) if d != 1]
        norm.running_mean = args[0].detach().mean(across)
        norm.running_var = args[0].detach().var(across, correction=0)
        norm.momentum = 0.0


def frozen_truth(setup: Setup) -> tuple[Tensor, Tensor]:
    """<g_n, V> with g_n of the constant statistics and V of the training mode; and |g_n||V|."""
    named = {name: p for name, p in setup.model.named_parameters() if p.requires_grad}
    replica = copy.deepcopy(setup.model)
    meta_loss = F.cross_entropy(replica(setup.meta_batch[0]), setup.meta_batch[1])
    v = torch.autograd.grad(meta_loss, [replica.get_parameter(name) for name in named])
    constant = with_constant_statistics(setup)
    dots, sizes = [], []
    for x, y in zip(*setup.batch, strict=True):
        loss = F.cross_entropy(constant(x[None]), y[None])
        g = torch.autograd.grad(loss, [constant.get_parameter(name) for name in named])
        dots.append(sum((a * b).sum() for a, b in zip(g, v, strict=True)))
        sizes.append(torch.stack([a.norm() for a in g]).norm() * torch.stack([a.norm() for a in v]).norm())
    return torch.stack([torch.as_tensor(dot) for dot in dots]), torch.stack(sizes)


SETTINGS = pytest.mark.parametrize("settings", [{}, {"affine": False}, {"tracked": False}, {"momentum": None}], ids=str)


@SETTINGS
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("engine", ["auto", "ghost"])
def test_dots_of_constant_statistics_and_the_exact_gradient(settings: Any, memory: str, engine: str) -> None:
    setup = setup_of(**settings)
    want, size = frozen_truth(setup)
    truth = setup.oracle()
    plain = copy.deepcopy(setup.model)
    plain(setup.batch[0])
    result = metakern.l2rw_step(
        setup.model, setup.batch, setup.meta_batch, engine=engine, memory=memory, batchnorm="frozen"
    )
    assert result.engine == "ghost_frozen"
    budget.assert_within(result.dots, want, size, name="dots")
    budget.assert_within(result.losses, truth.losses, 1 + truth.losses, name="losses")
    budget.assert_within(result.meta_loss, truth.meta_loss, 1 + truth.meta_loss, name="meta loss")
    budget.assert_gradient(gradients(setup.model), truth, weights=result.weights)
    for (name, got), expected in zip(setup.model.named_buffers(), plain.buffers(), strict=True):
        budget.assert_within(got.double(), expected.double(), 1 + expected.abs(), dtype=torch.float64, name=name)
    assert float(torch.corrcoef(torch.stack([result.dots, truth.dots]))[0, 1]) > 0.9


def test_several_steps_with_one_model() -> None:
    """The verdict on independence is kept for the frozen form alone."""
    setup = setup_of()
    for batchnorm, engine in (
        ("exact", "jvp"),
        ("frozen", "ghost_frozen"),
        ("exact", "jvp"),
        ("frozen", "ghost_frozen"),
    ):
        result = metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, batchnorm=batchnorm)
        assert result.engine == engine
    with pytest.raises(NotImplementedError, match=r"batch_norm in training mode.*batchnorm='frozen'"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost")
    same = metakern.grad_dots(setup.model, setup.batch, setup.batch, batchnorm="frozen")
    assert same.engine == "ghost_frozen"


def test_no_effect_without_batch_statistics() -> None:
    setup = setup_of()
    setup.model.eval()
    result = metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, batchnorm="frozen")
    assert result.engine == "ghost"


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_other_interaction_is_not_frozen() -> None:
    """auto then takes the exact engine; ghost refuses, and nothing has changed."""
    setup = setup_of()
    setup.model.append(Centred())
    before = Snapshot.of(setup.model)
    with pytest.raises(NotImplementedError, match="examples interact"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost", batchnorm="frozen")
    before.assert_unchanged(setup.model)
    truth, plain = setup.oracle(), copy.deepcopy(setup.model)
    plain(setup.batch[0])
    result = metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, batchnorm="frozen")
    assert result.engine == "jvp"
    budget.assert_dots(result.dots, truth)
    for got, want in zip(setup.model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, want)


def test_dropout_shares_its_mask() -> None:
    """With one seed, the gradient of equal weights is that of a plain step."""
    setup = setup_of()
    setup.model.insert(8, nn.Dropout(0.5))
    answers = []
    for _ in range(2):
        torch.manual_seed(3)
        metakern.reweight_step(setup.model, setup.batch, setup.meta_batch, rule=torch.ones_like, batchnorm="frozen")
        answers.append(gradients(setup.model))
    torch.manual_seed(3)
    plain = copy.deepcopy(setup.model)
    plain.zero_grad()
    F.cross_entropy(plain(setup.batch[0]), setup.batch[1], reduction="sum").backward()
    for name, p in plain.named_parameters():
        for answer in answers:
            assert p.grad is not None
            budget.assert_within(answer[name], p.grad, 1 + p.grad.abs().max(), name=name)  # pyright: ignore


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"batchnorm": "eval"}, "batchnorm must be 'exact' or 'frozen', got 'eval'"),
        ({"batchnorm": "frozen", "engine": "jvp"}, "batchnorm='frozen' is for engine='ghost'"),
        ({"batchnorm": "frozen", "micro_batch": 2}, "cannot be combined"),
    ],
)
def test_arguments(keywords: dict[str, Any], match: str) -> None:
    setup = setup_of()
    before = Snapshot.of(setup.model)
    with pytest.raises(ValueError, match=match):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, **keywords)
    before.assert_unchanged(setup.model)


def test_one_value_per_channel() -> None:
    """torch's own refusal comes through."""
    setup = setup_of()
    setup.batch = (setup.batch[0][:1], setup.batch[1][:1])
    before = Snapshot.of(setup.model)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, batchnorm="frozen")
    before.assert_unchanged(setup.model)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: torch.tanh(self.norm(self.first(x))), x, use_reentrant=False)
        return self.last(hidden)  # type: ignore[arg-type]


def test_checkpointed_layers_are_not_frozen() -> None:
    """They would take their statistics anew in the backward pass."""
    model, (batch, meta_batch) = Checkpointed(), inputs.pair(5, 3, 4, classes=3)
    with pytest.raises(NotImplementedError, match="runs again in the backward pass"):
        metakern.l2rw_step(model, batch, meta_batch, engine="ghost", batchnorm="frozen")
    assert metakern.l2rw_step(model, batch, meta_batch, batchnorm="frozen").engine == "jvp"
