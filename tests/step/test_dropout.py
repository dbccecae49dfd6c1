"""One mask per step: the dots and the weighted gradient must belong to the same thinned network."""

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import gradients
from metakern.testing.oracle import oracle

ENGINES = pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
MEMORIES = pytest.mark.parametrize("memory", ["reuse", "two_pass"])


class Recorded(nn.Module):
    """Draws a mask from torch's generator and keeps it; or repeats the masks that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []
        self.given: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        mask = self.given
        if mask is None:
            mask = (torch.rand(x.shape) > 0.4).to(x.dtype)
            self.drawn.append(mask)
        return x * mask / 0.6


def network(drop: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), drop, nn.Linear(8, 3)).double()


@ENGINES
@MEMORIES
def test_dots_and_gradient_share_the_mask(engine: str, memory: str) -> None:
    drop = Recorded()
    model = network(drop)
    batch, meta_batch = inputs.pair(7, 4, 4, classes=3)
    result = metakern.l2rw_step(model, batch, meta_batch, engine=engine, memory=memory)
    train_masks = [mask for mask in drop.drawn if len(mask) == 7]
    meta_masks = [mask for mask in drop.drawn if len(mask) == 4]
    assert train_masks
    assert meta_masks
    # The first pass over a batch is the one that counts; what a repeated pass drew shows in the dots if it matters.

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        for module in model.modules():
            if isinstance(module, Recorded):
                module.given = batch[2]
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    fixed = Setup(model, (*batch, train_masks[0]), (*meta_batch, meta_masks[0]), loss_fn=losses)
    truth = fixed.oracle()
    budget.assert_dots(result.dots, truth)
    budget.assert_gradient(gradients(model), truth, weights=result.weights)


@ENGINES
@MEMORIES
@pytest.mark.parametrize("drop", [nn.Dropout(0.4), nn.AlphaDropout(0.3), nn.RReLU()], ids=str)
def test_gradient_belongs_to_the_returned_dots(engine: str, memory: str, drop: nn.Module) -> None:
    """With torch's own masks, which cannot be read out: the gradient weighted by w, along v, is sum_n w_n dots_n.

    The meta batch is served without dropout (it is told apart by its size), so that v is known.
    """
    model = network(drop)
    batch, meta_batch = inputs.pair(9, 5, 4, classes=3)

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        layers = model if len(batch[0]) == 9 else [model[0], model[1], model[3]]
        hidden = batch[0]
        for layer in layers:
            hidden = layer(hidden)
        return nn.functional.cross_entropy(hidden, batch[1], reduction="none")

    truth = oracle(model.eval(), meta_batch, meta_batch, loss_fn=losses)
    result = metakern.reweight_step(
        model.train(), batch, meta_batch, loss_fn=losses, engine=engine, memory=memory, rule=torch.ones_like
    )
    direction = truth.gradient(torch.full((5,), 0.2, dtype=torch.float64))
    along = sum((grad * direction[name]).sum() for name, grad in gradients(model).items() if grad is not None)
    scale = sum(grad.norm() for grad in gradients(model).values() if grad is not None) * truth.meta_norm
    budget.assert_within(result.dots.sum(), torch.as_tensor(along), scale, name="sum of dots")


@ENGINES
@MEMORIES
def test_the_generator_moves_on(engine: str, memory: str) -> None:
    """Two steps draw two masks, and the same seed draws the same."""
    model = network(nn.Dropout(0.5))
    batch, meta_batch = inputs.pair(7, 4, 4, classes=3)

    def dots(seed: int | None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return metakern.l2rw_step(model, batch, meta_batch, engine=engine, memory=memory).dots

    first, second, again = dots(3), dots(None), dots(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_engines_draw_the_same_masks() -> None:
    """With one seed every engine answers the same question."""
    batch, meta_batch = inputs.pair(7, 4, 4, classes=3)
    model = network(nn.Dropout(0.5))
    answers = {}
    for engine in ("ghost", "jvp", "double_backward"):
        torch.manual_seed(5)
        answers[engine] = metakern.grad_dots(model, batch, meta_batch, engine=engine).dots
    for engine, dots in answers.items():
        budget.assert_within(dots, answers["jvp"], 1.0, name=engine)


def test_attention_dropout() -> None:
    """Dropout inside fused attention: dots and gradient of one step against a repeat with the same seed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True), nn.Flatten(), nn.Linear(32, 3)
    ).double()
    batch, meta_batch = inputs.pair(6, 3, 4, 8, classes=3)
    torch.manual_seed(1)
    ghost = metakern.l2rw_step(model, batch, meta_batch, engine="ghost")
    kept = {name: grad.clone() for name, grad in gradients(model).items()}
    torch.manual_seed(1)
    two_pass = metakern.l2rw_step(model, batch, meta_batch, engine="ghost", memory="two_pass")
    budget.assert_within(two_pass.dots, ghost.dots, 1.0)
    for name, grad in gradients(model).items():
        budget.assert_within(grad, kept[name], 1.0, name=name)
