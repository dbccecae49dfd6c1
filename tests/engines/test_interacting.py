"""Examples that see each other: forward mode is exact, ghost refuses, and running statistics move once."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.catalogue.structures import BatchNormalised
from metakern.testing.judge import Snapshot, judge_step
from metakern.testing.oracle import oracle


def batch_norm_setup(n: int = 6, m: int = 4) -> Setup:
    torch.manual_seed(0)
    model = BatchNormalised().double()
    with torch.no_grad():
        model.norm.running_mean.normal_()
    return Setup(model, *inputs.pair(n, m, 2, 5, 5, classes=3), interacting=True)


def contrastive_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Each example is compared with every other one."""
    features = model(batch[0])
    similar = features @ features.T
    return nn.functional.cross_entropy(similar, torch.arange(len(similar)).roll(1), reduction="none")


def survival_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cox's partial likelihood, the first being the last to die; `logcumsumexp` takes logarithms of its gradients."""
    risk = model(batch[0]).sum(1)
    return risk.logcumsumexp(0) - risk + 0.1 * risk.square()


class Centred(nn.Module):
    """Subtracts the mean of the batch, with no layer that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.strength = nn.Linear(4, 6), nn.Linear(6, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(torch.tanh(hidden - self.strength * hidden.mean(0)))


class Graph(nn.Module):
    """A graph convolution: every node is an example and sees its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        ring = (torch.eye(n, dtype=x.dtype) + torch.eye(n, dtype=x.dtype).roll(1, 0)) / 2
        return ring @ self.second(torch.tanh(ring @ self.first(x)))


def linear_setup(model: nn.Module, loss_fn: Any = None) -> Setup:
    torch.manual_seed(0)
    return Setup(model.double(), *inputs.pair(6, 4, 4, classes=3), loss_fn=loss_fn, interacting=True)


INTERACTING = {
    "batch-norm": batch_norm_setup,
    "survival": lambda: linear_setup(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), survival_losses),
    "contrastive": lambda: linear_setup(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), contrastive_losses),
    "centred": lambda: linear_setup(Centred()),
    "graph": lambda: linear_setup(Graph()),
}

every_setup = pytest.mark.parametrize("make", INTERACTING.values(), ids=INTERACTING.keys())


@every_setup
@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
def test_exact(make: Any, engine: str) -> None:
    judgement = judge_step(metakern.l2rw_step, make(), engine=engine)
    assert judgement.result.engine == ("jvp" if engine == "auto" else engine)


@every_setup
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_ghost_refuses(make: Any, memory: str) -> None:
    setup = make()
    before = Snapshot.of(setup.model)
    with pytest.raises(NotImplementedError, match="interact"):
        metakern.l2rw_step(
            setup.model, setup.batch, setup.meta_batch, loss_fn=setup.loss_fn, engine="ghost", memory=memory
        )
    before.assert_unchanged(setup.model)


@every_setup
def test_single_example_is_exact_by_any_engine(make: Any) -> None:
    setup = make()
    setup.batch = tuple(part[:1] for part in setup.batch)
    if isinstance(setup.model, Centred):
        pytest.skip("one example minus its own mean is zero: the first layer takes no part")
    judge_step(metakern.l2rw_step, setup, engine="auto")


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_single_example_with_statistics_over_its_positions(memory: str) -> None:
    """One example does not interact, so ghost serves it: with the statistics of the batch, not the running ones."""
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    setup = Setup(nn.Sequential(*layers).double(), *inputs.pair(1, 2, 2, 5, classes=3), interacting=True)
    judge_step(metakern.l2rw_step, setup, engine="ghost", memory=memory)


@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
def test_running_statistics_move_as_in_a_plain_step(engine: str) -> None:
    setup = batch_norm_setup()
    plain = copy.deepcopy(setup.model)
    plain(setup.batch[0])
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine=engine)
    for (name, got), want in zip(setup.model.named_buffers(), plain.buffers(), strict=True):
        budget.assert_within(got, want, 1.0, dtype=torch.float64, name=name)


@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
def test_running_statistics_do_not_move_in_eval(engine: str) -> None:
    setup = batch_norm_setup()
    setup.model.eval()
    setup.interacting = False
    judge_step(metakern.l2rw_step, setup, engine=engine)


def test_grad_dots_moves_no_statistics() -> None:
    """It asks a question, and is no step."""
    setup = batch_norm_setup()
    metakern.grad_dots(setup.model, setup.batch, setup.meta_batch)
    assert int(setup.model.norm.num_batches_tracked) == 0


def test_batch_norm_after_eval_and_back() -> None:
    """What was learnt about the model in one mode must not be believed in the other."""
    setup = batch_norm_setup()
    for training, engine in ((False, "ghost"), (True, "jvp"), (False, "ghost"), (True, "jvp")):
        setup.model.train(training)
        setup.interacting = training
        setup.model.zero_grad()
        assert judge_step(metakern.l2rw_step, setup).result.engine == engine


def test_frozen_batch_norm_in_a_training_model() -> None:
    setup = batch_norm_setup()
    setup.model.norm.eval()
    setup.interacting = False
    assert judge_step(metakern.l2rw_step, setup).result.engine == "ghost"


def test_coupling_that_starts_later() -> None:
    """A coupling whose strength is an attribute, zero at first, as in a warm-up: step one must not decide for all."""
    setup = linear_setup(Centred())
    for strength in (0.0, 0.5, 0.0, 1.0):
        setup.model.strength = strength
        setup.model.zero_grad()
        judge_step(metakern.l2rw_step, setup)


def test_coupling_in_the_loss_that_starts_later() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    strength = 0.0

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        alone = nn.functional.cross_entropy(logits, batch[1], reduction="none")
        return alone + strength * (logits - logits.mean(0)).square().sum(1)

    setup = linear_setup(model, losses)
    for strength in (0.0, 0.5, 1.0):  # noqa: B007 - read by the loss
        setup.model.zero_grad()
        judge_step(metakern.l2rw_step, setup)


class Switched(Centred):
    """The coupling sits behind a branch: its operations are absent at first."""

    switched_on = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.switched_on:
            hidden = hidden - hidden.mean(0)
        return self.second(torch.tanh(hidden))


def test_coupling_behind_a_branch() -> None:
    setup = linear_setup(Switched())
    for setup.model.switched_on in (False, True, False):
        setup.model.zero_grad()
        judge_step(metakern.l2rw_step, setup)


class SortedByLength(nn.Module):
    """Sorts the examples by a feature, works on them, and puts them back: the order differs from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.second(torch.tanh(self.first(x[order])))[order.argsort()]


def test_an_order_that_differs_from_batch_to_batch() -> None:
    """The first batch happens to be sorted already; the next is not."""
    setup = linear_setup(SortedByLength())
    setup.interacting = False
    shuffled = setup.batch
    order = shuffled[0][:, 0].argsort()
    setup.batch = (shuffled[0][order], shuffled[1][order])
    judge_step(metakern.l2rw_step, setup)
    setup.batch = shuffled
    setup.model.zero_grad()
    judge_step(metakern.l2rw_step, setup)


class Rolled(nn.Module):
    """Examples change places by a distance that is an attribute: the same operations, other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.distance = nn.Linear(4, 6), nn.Linear(6, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.roll(self.distance, 0)))).roll(-self.distance, 0)


def test_a_distance_that_changes() -> None:
    setup = linear_setup(Rolled())
    setup.interacting = False
    for distance in (0, 1, 4, 0):
        setup.model.distance = distance
        setup.model.zero_grad()
        judge_step(metakern.l2rw_step, setup)


def hinge_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs repel each other where they are too much alike, as in a contrastive or triplet loss with a margin."""
    features = model(batch[0])
    alike = torch.relu(features @ features.T - 40.0)
    return nn.functional.cross_entropy(features, batch[1], reduction="none") + alike.sum(1)


def test_coupling_that_wakes_up() -> None:
    """No pair is within the margin in the first batch, so nothing flows between examples; many are in the second."""
    setup = linear_setup(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), hinge_losses)
    quiet, loud = setup.batch, (setup.batch[0] * 30, setup.batch[1])
    for setup.batch in (quiet, loud, quiet):
        setup.model.zero_grad()
        judge_step(metakern.l2rw_step, setup)


@pytest.mark.parametrize("strength", [1e-2, 1e-4, 1e-6, 1e-8])
def test_weak_coupling(strength: float) -> None:
    """However weak the interaction: the answer is exact, or there is none."""
    setup = linear_setup(Centred())
    setup.model.strength = strength
    judge_step(metakern.l2rw_step, setup)


@pytest.mark.parametrize("strength", [1e-2, 1e-4])
def test_weak_coupling_in_float32(strength: float) -> None:
    setup = linear_setup(Centred())
    setup.model.strength = strength
    setup.model.float()
    setup.batch, setup.meta_batch = ((x.float(), y) for x, y in (setup.batch, setup.meta_batch))
    judge_step(metakern.l2rw_step, setup, plain=setup.oracle(dtype=torch.float32))


def test_two_threads_step_two_models() -> None:
    """torch has one level of dual numbers in a process."""
    setups = [linear_setup(Centred()) for _ in range(2)]
    truths = [setup.oracle() for setup in setups]

    def steps(setup: Setup) -> list[Tensor]:
        return [metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, engine="jvp").dots for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for truth, found in zip(truths, pool.map(steps, setups), strict=True):
            for dots in found:
                budget.assert_dots(dots, truth)


class Kinked(nn.Module):
    """The first layer has a gradient that is not finite for an input of zeros, and the next ones centre the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.middle, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.body(x).square().sqrt()))
        return self.head(hidden - hidden.mean(0))


def test_a_gradient_that_is_not_finite_elsewhere() -> None:
    """It does not keep the examples from being held apart where the dots run."""
    setup = linear_setup(Kinked())
    setup.batch[0][0] = 0
    names = ("middle.weight", "middle.bias")
    truth = oracle(setup.model, setup.batch, setup.meta_batch, names=names, interacting=True)
    for engine in ("auto", "double_backward"):
        found = metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, params="middle", engine=engine)
        budget.assert_dots(found.dots, truth)
    with pytest.raises(NotImplementedError, match="examples interact"):
        metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, params="middle", engine="ghost")
