"""A step by parts of the batch: the numbers of the whole, or a refusal where parts are not the whole."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.capture.refusal import EngineUnavailable
from metakern.testing import budget, inputs
from metakern.testing.catalogue import CASES, Case
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, gradients, judge_step

# torch itself says this of convolutions that need one column more on one side.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

MEMORIES = pytest.mark.parametrize("memory", ["reuse", "two_pass"])


def setup_of(*middle: nn.Module, n: int = 7, m: int = 5) -> Setup:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))
    return Setup(model.double(), *inputs.pair(n, m, 4, classes=3))


@MEMORIES
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
def test_exact(size: int, memory: str) -> None:
    judgement = judge_step(metakern.l2rw_step, setup_of(), memory=memory, micro_batch=size)
    assert judgement.result.engine == "ghost"


@MEMORIES
@pytest.mark.parametrize("case", [case for case in CASES if case.ghost == "exact"], ids=lambda case: case.name)
def test_exact_for_every_layer(case: Case, memory: str) -> None:
    judge_step(metakern.l2rw_step, case.make(5, 3), memory=memory, micro_batch=2)


@MEMORIES
def test_accumulates_and_steps(memory: str) -> None:
    """With momentum, on top of a gradient that is there, several times: as without parts."""
    setup = setup_of()
    models = setup.model, copy.deepcopy(setup.model)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for size, model, optimizer in zip((3, None), models, optimizers, strict=True):
        for _ in range(4):
            metakern.l2rw_step(model, setup.batch, setup.meta_batch, memory=memory, micro_batch=size)
            metakern.l2rw_step(
                *(model, setup.batch, setup.meta_batch),
                **{"memory": memory, "micro_batch": size, "accumulate": True, "optimizer": optimizer},
            )
    for got, want in zip(*(model.parameters() for model in models), strict=True):
        budget.assert_within(got, want, 1 + want.abs(), dtype=torch.float64)


def test_any_rule_and_direction() -> None:
    """The rule sees all dots at once, and the direction is made from the whole V."""
    results = []
    for size in (None, 2):
        setup = setup_of()
        result = metakern.reweight_step(
            *(setup.model, setup.batch, setup.meta_batch),
            rule=lambda dots: (dots - dots.mean()) / dots.std(),
            direction=lambda v: {"0.weight": v["0.weight"] * 2},
            micro_batch=size,
        )
        results.append((result, gradients(setup.model)))
    (whole, want), (parts, got) = results
    budget.assert_within(parts.dots, whole.dots, whole.dots.abs().max())
    for name, gradient in got.items():
        assert gradient is not None
        budget.assert_within(gradient, want[name], want[name].norm(), name=name)  # pyright: ignore


def test_restricted_dots() -> None:
    setup = setup_of()
    truth = setup.oracle(names=["0.weight", "0.bias"])
    result = metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, params="0", micro_batch=2)
    budget.assert_dots(result.dots, truth)
    assert setup.model[0].weight.grad is None


def test_mappings_and_values_without_examples() -> None:
    def losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        each = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none", label_smoothing=batch["smooth"])
        return each * batch["scale"]

    setup = setup_of()
    setup.loss_fn = losses
    for name in ("batch", "meta_batch"):
        x, y = getattr(setup, name)
        setattr(setup, name, {"x": x, "y": y, "scale": torch.tensor(2.0).double(), "smooth": 0.1})
    setup.select = lambda batch, k: {**batch, "x": batch["x"][k : k + 1], "y": batch["y"][k : k + 1]}
    judge_step(metakern.l2rw_step, setup, micro_batch=2)


class Masks(nn.Module):
    """Dropout that tells its masks to one who is no part of the model."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.tell = tell

    def forward(self, x: Tensor) -> Tensor:
        mask = (torch.rand(x.shape) > 0.4).to(x.dtype)
        self.tell(mask)
        return x * mask


@MEMORIES
def test_one_mask_for_dots_and_gradient(memory: str) -> None:
    """Both passes over a part draw the same mask; the next part and the next step draw others."""
    drawn: list[Tensor] = []
    setup = setup_of(Masks(drawn.append), m=2)
    first = metakern.reweight_step(
        setup.model, setup.batch, setup.meta_batch, rule=torch.ones_like, memory=memory, micro_batch=3
    )
    parts = [mask for mask in drawn if len(mask) == 3]
    by_part = [parts[0], next(mask for mask in parts if not torch.equal(mask, parts[0]))]
    for mask in by_part:
        assert sum(torch.equal(mask, other) for other in parts) >= 2
    second = metakern.reweight_step(
        setup.model, setup.batch, setup.meta_batch, rule=torch.ones_like, memory=memory, micro_batch=3
    )
    assert not torch.equal(first.losses, second.losses)


class Passes(nn.Module):
    """Counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.so_far = 0

    def forward(self, x: Tensor) -> Tensor:
        self.so_far += 1
        return x


@MEMORIES
def test_the_second_run_of_a_part_leaves_no_trace_in_attributes(memory: str) -> None:
    counting = Passes()
    setup = setup_of(counting, m=2)
    metakern.reweight_step(
        setup.model, setup.batch, setup.meta_batch, rule=torch.ones_like, memory=memory, micro_batch=3
    )
    parts = -(-len(setup.batch[0]) // 3)
    assert counting.so_far == parts + 1  # and the meta batch's


@MEMORIES
def test_gradient_belongs_to_the_dots_under_dropout(memory: str) -> None:
    """<sum_n w_n g_n, v> = sum_n w_n dots_n; the meta batch is told apart by its size and has no dropout."""
    setup = setup_of(nn.Dropout(0.4), n=7, m=2)

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        meta = bool((batch[1] >= 3).all())
        x = batch[0]
        for layer in model:  # pyright: ignore[reportGeneralTypeIssues]
            x = x if meta and isinstance(layer, nn.Dropout) else layer(x)
        return F.cross_entropy(x, batch[1] % 3, reduction="none")

    x, y = setup.meta_batch
    setup.meta_batch, setup.loss_fn = (x, y + 3), losses
    truth = Setup(copy.deepcopy(setup.model).eval(), *(2 * [setup.meta_batch]), loss_fn=losses).oracle()
    direction = truth.gradient(torch.full((2,), 0.5))
    result = metakern.reweight_step(
        *(setup.model, setup.batch, setup.meta_batch),
        **{"loss_fn": losses, "rule": torch.ones_like, "memory": memory, "micro_batch": 3},
    )
    along = sum((grad * direction[name]).sum() for name, grad in gradients(setup.model).items() if grad is not None)
    scale = sum(grad.norm() for grad in gradients(setup.model).values() if grad is not None) * truth.meta_norm
    budget.assert_within(result.dots.sum(), torch.as_tensor(along), scale)


class Counting(nn.Module):
    """Counts passes, or examples."""

    def __init__(self, examples: bool = False) -> None:
        super().__init__()
        self.examples = examples
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x) if self.examples else 1
        return x


def image_setup(*middle: nn.Module) -> Setup:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), *middle, nn.Flatten(), nn.Linear(27, 3))
    return Setup(model.double(), *inputs.pair(7, 5, 2, 5, 5, classes=3))


@pytest.mark.parametrize("size", [None, 1, 3])
def test_buffers_move_as_in_one_pass(size: int | None) -> None:
    """A counter, the statistics of instance normalisation, and the vectors of spectral normalisation."""
    setup = image_setup(Counting(), nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    nn.utils.parametrizations.spectral_norm(setup.model[-1])
    plain = copy.deepcopy(setup.model)
    plain(setup.batch[0])
    asked = copy.deepcopy(setup.model)
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, micro_batch=size)
    for (name, got), want in zip(setup.model.named_buffers(), plain.buffers(), strict=True):
        budget.assert_within(got.double(), want.double(), 1 + want.abs(), dtype=torch.float64, name=name)
    before = Snapshot.of(asked)
    metakern.grad_dots(asked, setup.batch, setup.meta_batch, micro_batch=size)
    before.assert_unchanged(asked)


def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    features = model(batch[0])
    return F.cross_entropy(features @ features.T, torch.arange(len(features)).roll(1), reduction="none")


def over_the_batch(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Divided by a count over the batch: no gradient shows it."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / (batch[1] < 9).sum()


def by_tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Each example's share of all counted tokens: the mean of a batch in which all are equally long."""
    counted = batch[1] >= 0
    each = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1].clamp(min=0), reduction="none") * counted
    return each.sum(1) * len(counted) / counted.sum()


def sorted_by_length() -> Setup:
    torch.manual_seed(0)
    x, y = inputs.normal(24, 3, 6, seed=1), inputs.labels(24, 3, classes=3, seed=2)
    y[16:, 1:] = -100
    meta = inputs.normal(4, 3, 6, seed=3), inputs.labels(4, 3, classes=3, seed=4)
    return Setup(nn.Linear(6, 3).double(), (x, y), meta, loss_fn=by_tokens)


def with_dropout(loss_fn: Any) -> Setup:
    setup = setup_of(nn.Dropout(0.2))
    setup.loss_fn = loss_fn
    return setup


def examples_second(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Positions first, as many as there are examples."""
    return model(batch[0]).square().sum((0, 2))


def by_class(model: nn.Module, batch: Any) -> Tensor:
    """Classes count alike. Two examples of different ones do not show that."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / torch.bincount(batch[1])[batch[1]]


def by_size(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * (2.0 if len(batch[1]) > 3 else 1.0)


REFUSED: dict[str, tuple[Callable[[], Setup], type[Exception], str]] = {
    "batch-norm": (lambda: setup_of(nn.BatchNorm1d(6)), NotImplementedError, "examples interact.*micro_batch"),
    "contrastive": (lambda: _with(contrastive), NotImplementedError, "examples interact"),
    "count-over-batch": (lambda: _with(over_the_batch), NotImplementedError, "counts over the batch"),
    "count-under-dropout": (lambda: with_dropout(over_the_batch), NotImplementedError, "counts over the batch"),
    "sorted-by-length": (sorted_by_length, NotImplementedError, "counts over the batch"),
    "class-counts": (lambda: _with(by_class), NotImplementedError, "counts over the batch"),
    "size": (lambda: _with(by_size), NotImplementedError, "counts over the batch"),
    "buffer-of-examples": (lambda: setup_of(Counting(examples=True)), NotImplementedError, "buffer '1.seen'"),
    "positions-first": (
        lambda: _with(examples_second, lambda x, y: (inputs.normal(7, 7, 4),)),
        *(ValueError, r"micro_batch took \d examples.*7 losses"),
    ),
    "sizes": (lambda: _with(None, lambda x, y: (x, y, torch.ones(9))), ValueError, "dimension 0.*shapes"),
    "objects": (lambda: _with(over_the_batch, lambda x, y: object()), TypeError, "micro_batch splits tensors.*object"),
}


class CountingTraining(nn.Module):
    """Counts its calls in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x


def test_counters_of_training_passes_next_to_dropout() -> None:
    """Losses under dropout are compared in eval mode, in which the counter stands still."""
    setup = setup_of(nn.Dropout(0.2), CountingTraining())
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, micro_batch=3)
    assert setup.model[2].calls == 1


def _with(loss_fn: Any, batch: Any = None) -> Setup:
    setup = setup_of()
    setup.loss_fn = loss_fn
    if batch is not None:
        setup.batch = setup.meta_batch = batch(*setup.batch)
    return setup


@MEMORIES
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_where_parts_are_not_the_whole(name: str, size: int, memory: str) -> None:
    make, error, match = REFUSED[name]
    setup = make()
    for param in setup.model.parameters():
        param.grad = torch.ones_like(param)
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=0.1, momentum=0.9)
    before = Snapshot.of(setup.model, optimizer)
    with pytest.raises(error, match=match):
        metakern.l2rw_step(
            *(setup.model, setup.batch, setup.meta_batch),
            **{"loss_fn": setup.loss_fn, "optimizer": optimizer, "memory": memory, "micro_batch": size},
        )
    before.assert_unchanged(setup.model, optimizer)


@MEMORIES
@pytest.mark.parametrize("when", range(1, 12))
def test_a_failure_leaves_everything_as_before(when: int, memory: str) -> None:
    """Whichever of the passes over the parts fails."""
    calls = itertools.count(1)  # an iterator, which is not put back after passes that do not count

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if next(calls) == when:
            raise OSError("the disk is on fire")
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    setup = setup_of(nn.Dropout(0.2), Counting(), nn.BatchNorm1d(6).eval())
    for param in setup.model.parameters():
        param.grad = torch.ones_like(param)
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=0.1, momentum=0.9)
    before = Snapshot.of(setup.model, optimizer)
    with pytest.raises((OSError, NotImplementedError), match="on fire"):
        metakern.reweight_step(
            *(setup.model, setup.batch, setup.meta_batch),
            **{"rule": torch.ones_like, "loss_fn": losses, "optimizer": optimizer, "memory": memory, "micro_batch": 3},
        )
    before.assert_unchanged(setup.model, optimizer)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"micro_batch": 0}, "micro_batch must be None or a positive int, got 0"),
        ({"micro_batch": 2.0}, "micro_batch must be"),
        ({"micro_batch": True}, "micro_batch must be"),
        ({"micro_batch": 2, "engine": "jvp"}, "micro_batch needs engine='ghost'"),
    ],
)
def test_arguments(keywords: dict[str, Any], match: str) -> None:
    setup = setup_of()
    with pytest.raises(ValueError, match=match):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, **keywords)


class Experts(nn.Module):
    """A layer that only some examples go through, behind a branch: parts without such an example skip it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare = nn.Linear(4, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        chosen = x[:, 0] > 5
        if bool(chosen.any()):
            hidden = torch.where(chosen.unsqueeze(1), self.rare(hidden), hidden)
        return self.head(hidden)


@MEMORIES
def test_a_parameter_need_not_take_part_in_every_part(memory: str) -> None:
    setup = setup_of()
    setup.model = Experts().double()
    setup.batch[0][4, 0] = setup.meta_batch[0][0, 0] = 9.0
    judge_step(metakern.l2rw_step, setup, memory=memory, micro_batch=3)
    setup.batch[0][4, 0] = 0.0
    with pytest.raises(ValueError, match=r"'rare\.weight'.*did not take part"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, memory=memory, micro_batch=3)


@MEMORIES
def test_parts_without_weight_are_not_run_again(memory: str) -> None:
    parts = itertools.count()  # an iterator, which is not put back after passes that do not count

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        if len(output) == 3:
            next(parts)

    setup = setup_of(n=6, m=2)
    setup.model[0].register_forward_hook(watch)
    for rule in (torch.zeros_like, lambda dots: torch.tensor([0, 0, 0, 0, 1.0, 0]).double()):
        for _ in range(2):  # the first one is looked at more closely
            before = next(parts) + 1
            metakern.reweight_step(setup.model, setup.batch, setup.meta_batch, rule=rule, memory=memory, micro_batch=3)
        assert next(parts) - before == (2 if rule is torch.zeros_like else 3)


@MEMORIES
def test_half_precision(memory: str) -> None:
    setup = setup_of()
    truth = setup.oracle()
    setup.model.to(torch.bfloat16)
    setup.batch, setup.meta_batch = ((x.bfloat16(), y) for x, y in (setup.batch, setup.meta_batch))
    plain = setup.oracle(dtype=torch.bfloat16)
    judge_step(metakern.l2rw_step, setup, truth=setup.oracle(), plain=plain, memory=memory, micro_batch=2)
    assert truth.dots.shape == (7,)


def over_all_tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """n times the mean over the labelled tokens of the batch."""
    each = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none")
    return each.sum(1) / (batch[1] != -100).sum() * len(each)


def texts(n: int, *, short: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    labels = inputs.labels(n, 6, classes=3)
    for row in short:
        labels[row, 1:] = -100
    return inputs.normal(n, 6, 4), labels


def test_a_count_over_a_batch_with_short_texts_at_its_end() -> None:
    model = nn.Linear(4, 3).double()
    with pytest.raises(EngineUnavailable, match="counts over the batch"):
        metakern.grad_dots(
            *(model, texts(15, short=tuple(range(9, 15))), texts(4)), loss_fn=over_all_tokens, micro_batch=4
        )


@pytest.mark.parametrize("short", [(10, 11, 12, 13, 14, 15), (1, 2, 4, 6, 9, 13), (7,)])
def test_a_count_over_the_batch_in_later_steps(short: tuple[int, ...]) -> None:
    """Which tells nothing as long as all texts are as long. At each step, others are looked at."""
    model = nn.Linear(4, 3).double()

    def step(*short: int) -> None:
        metakern.grad_dots(model, texts(16, short=short), texts(4), loss_fn=over_all_tokens, micro_batch=4)

    def eight_steps() -> None:
        for _ in range(8):
            step(*short)

    step()
    with pytest.raises(EngineUnavailable, match="counts over the batch"):
        eight_steps()


class EarlyLearning:
    """Remembers what was predicted for each example.

    Source: Liu et al., Early-Learning Regularization, NeurIPS 2020.
    """

    def __init__(self, examples: int, classes: int) -> None:
        self.targets = torch.zeros(examples, classes, dtype=torch.float64)

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, index = batch
        p = model(x).softmax(1)
        self.targets[index] = 0.7 * self.targets[index] + 0.3 * p.detach()
        return F.nll_loss(p.log(), y, reduction="none") + 3 * (1 - (self.targets[index] * p).sum(1)).log()


def test_a_loss_that_remembers_examples() -> None:
    setup, found = setup_of(n=12, m=4), []
    for size in (None, 4):
        loss = EarlyLearning(20, 3)
        batch, meta_batch = (*setup.batch, torch.arange(12)), (*setup.meta_batch, torch.arange(16, 20))
        result = metakern.grad_dots(setup.model, batch, meta_batch, loss_fn=loss, micro_batch=size)
        found.append((result.dots, loss.targets))
    for whole, parts in zip(*found, strict=True):
        budget.assert_within(parts, whole, 1 + whole.abs(), dtype=torch.float64)
