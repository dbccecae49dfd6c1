"""Recurrent layers as cuDNN computes them: without a second derivative, and with dropout masks of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import metakern
from metakern.capture import repeatable
from metakern.capture.repeatable import RECURRENT
from metakern.layers.forward.forms import Forms, twice_differentiable
from metakern.layers.forward.recurrent_steps import STEP_BY_STEP
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)


def setup(layer: type[nn.RNNBase], device: str, dropout: float = 0.0) -> Setup:
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0])[0][:, -1], batch[1], reduction="none")

    torch.manual_seed(0)
    model = layer(4, 3, num_layers=2, dropout=dropout, batch_first=True).double().to(device)
    batch, meta_batch = ((x.to(device), y.to(device)) for x, y in inputs.pair(6, 3, 5, 4, classes=3))
    return Setup(model, batch, meta_batch, losses)


class Calls(torch.overrides.TorchFunctionMode):
    """Whole recurrent layers that were run: name, arguments, and whether cuDNN was allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[tuple[str, Any, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RECURRENT:
            self.met.append((func.__name__, args, torch.backends.cudnn.enabled))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", LAYERS)
def test_are_differentiated_twice_without_cudnn(layer: type[nn.RNNBase]) -> None:
    model, x = layer(4, 3), torch.ones(5, 2, 4)
    with Calls() as calls:  # beneath, so that it meets what the other hands on
        model(x)
        with twice_differentiable():
            model(x)
    assert [allowed for *_, allowed in calls.met] == [True, False]
    assert torch.backends.cudnn.enabled


def test_only_masks_of_a_gpu_are_drawn_in_another_way() -> None:
    x = torch.ones(5, 2, 4)
    packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 0]])
    with Calls() as calls:
        for layer in LAYERS:
            for model in (layer(4, 3, 2), layer(4, 3, 2, dropout=0.5).eval(), layer(4, 3, 2, dropout=0.5)):
                model(x)
                model(packed)
    there = FakeTensor(FakeTensorMode(), torch.empty(3, device="meta"), torch.device("cuda:0"))
    for first, expected in ((x, [False] * 18), (there, [False, False, False, False, True, True] * 3)):
        found = [repeatable._draws_apart(name, (first, *args[1:]), {}) for name, args, _ in calls.met]
        assert found == expected
    assert repeatable._draws_apart("scaled_dot_product_attention", (there, there, there, None, 0.1), {})
    assert repeatable._draws_apart("scaled_dot_product_attention", (), {"query": there, "dropout_p": 0.1})
    assert not repeatable._draws_apart("scaled_dot_product_attention", (there, there, there), {})


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("layer", [*LAYERS, partial(nn.RNN, nonlinearity="relu"), partial(nn.LSTM, proj_size=2)])
def test_step_by_step(layer: Any, options: dict[str, Any], packed: bool) -> None:
    """As torch's layers, with all that they return and its gradients."""
    torch.manual_seed(0)
    model, x = layer(4, 3, **options).double(), torch.randn(5, 4, 4, dtype=torch.float64)
    given = nn.utils.rnn.pack_padded_sequence(x, [5, 4, 4, 1]) if packed else x
    found = []
    for forms in ({}, STEP_BY_STEP):
        with Forms(forms):
            outputs = [t for t in tree_leaves(model(given)) if isinstance(t, Tensor) and t.is_floating_point()]
        weights = [torch.randn(t.shape, generator=inputs.generator(7), dtype=t.dtype) for t in outputs]
        grads = torch.autograd.grad(outputs, list(model.parameters()), weights)
        found.append([*outputs, *grads])
    for got, want in zip(*found, strict=True):
        budget.assert_within(got, want, want.abs().max(), terms=100)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_cells_by_their_formulas(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = kind(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    want = model(x)
    with Forms(STEP_BY_STEP):
        found = model(x)
    for got, expected in zip(tree_leaves(found), tree_leaves(want), strict=True):
        budget.assert_within(got, expected, 1.0)


class Reader(nn.Module):
    """Reads all that a recurrent layer returns; sequences of several kinds for each example are rows of their own."""

    def __init__(self, cell: nn.RNNBase, rows: int = 1, start: str = "none") -> None:
        super().__init__()
        self.cell, self.rows, self.start = cell, rows, start
        width = (cell.proj_size or cell.hidden_size) * (1 + cell.bidirectional)
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(width, 3)
        if start == "learned":
            self.first = nn.Parameter(torch.randn(cell.num_layers * (1 + cell.bidirectional), 1, cell.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        if self.rows > 1:
            x = torch.stack([x, -x], 1).flatten(0, 1)
        given = () if self.start == "none" else (self._given(x),)
        y, last = self.cell(x if self.cell.batch_first else x.transpose(0, 1), *given)
        y = y.mean(1 if self.cell.batch_first else 0)
        states = last if isinstance(last, tuple) else (last,)
        kept = sum(state.mean(-1, keepdim=True).sum(0).expand_as(y) * (k + 1) for k, state in enumerate(states))
        return self.head(y + kept).unflatten(0, (-1, self.rows)).sum(1)

    def _given(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        count = self.cell.num_layers * (1 + self.cell.bidirectional)
        learned = self.start == "learned"
        h = self.first.expand(-1, len(x), -1) if learned else x[:, 0, :3].expand(count, -1, -1)
        return (h.contiguous(), h.contiguous() * 0.5) if isinstance(self.cell, nn.LSTM) else h.contiguous()


SIZES: dict[str, dict[str, Any]] = {
    "plain": {"batch_first": True},
    "time first": {},
    "deep": {"num_layers": 3, "batch_first": True},
    "both ways": {"num_layers": 2, "bidirectional": True},
    "without biases": {"bias": False, "batch_first": True},
}


def reader(layer: type[nn.RNNBase], options: dict[str, Any], **settings: Any) -> Setup:
    torch.manual_seed(0)
    return Setup(Reader(layer(4, 3, **options), **settings).double(), *inputs.pair(6, 3, 5, 4, classes=3))


def rule(given: Setup) -> str:
    uses = metakern.explain(given.model, given.batch, given.meta_batch).uses
    return next(use.rule for use in uses if use.function in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("layer", [*LAYERS, lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options)])
def test_all_that_they_return(layer: Any, options: dict[str, Any]) -> None:
    given = reader(layer, options)
    assert rule(given) == "recurrent"
    for memory in ("reuse", "two_pass"):
        assert judge_step(metakern.l2rw_step, given, memory=memory).result.engine == "ghost"


@pytest.mark.parametrize("settings", [{"rows": 2}, {"start": "of the data"}, {"start": "learned"}], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_and_what_was_there_before(layer: type[nn.RNNBase], settings: dict[str, Any]) -> None:
    given = reader(layer, {"batch_first": True}, **settings)
    assert rule(given) == ("generic" if settings == {"start": "learned"} else "recurrent")
    assert judge_step(metakern.l2rw_step, given).result.engine == "ghost"


def test_others_are_served_by_forward_mode_through_the_call() -> None:
    given = reader(nn.LSTM, {"proj_size": 2, "batch_first": True})
    assert rule(given) == "generic"
    judge_step(metakern.l2rw_step, given, engine="ghost")


@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_in_part(layer: type[nn.RNNBase]) -> None:
    given = reader(layer, {"num_layers": 2, "batch_first": True})
    for name in ("weight_ih_l0", "bias_hh_l0", "weight_hh_l1", "bias_ih_l1", "bias_hh_l1"):
        given.model.cell.get_parameter(name).requires_grad_(False)
    judge_step(metakern.l2rw_step, given, engine="ghost")
    some = "cell.weight_hh_l0"
    found = metakern.grad_dots(given.model, given.batch, given.meta_batch, params=some)
    budget.assert_dots(found.dots, given.oracle(names={some}))


@pytest.mark.parametrize("options", [{"batch_first": True}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_between_layers(layer: type[nn.RNNBase], options: dict[str, Any]) -> None:
    """The masks of the call itself are drawn again."""
    given = reader(layer, {"num_layers": 3, "dropout": 0.4, **options})
    assert rule(given) == "recurrent"
    found = {}
    for engine in ("ghost", "double_backward"):
        torch.manual_seed(1)
        found[engine] = metakern.l2rw_step(given.model, given.batch, given.meta_batch, engine=engine)
        found[engine, "gradient"] = torch.cat([p.grad.flatten() for p in given.model.parameters()])
    for got, want in (
        (found["ghost"].dots, found["double_backward"].dots),
        (found["ghost", "gradient"], found["double_backward", "gradient"]),
    ):
        budget.assert_within(got, want, 1.0)


def test_layers_that_share_their_weights() -> None:
    given = reader(nn.LSTM, {"num_layers": 2, "batch_first": True})
    cell = nn.LSTM(3, 3, 2, batch_first=True).double()
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, f"{name}_l1", getattr(cell, f"{name}_l0"))
    given.model.stem, given.model.cell = nn.Linear(4, 3).double(), cell
    judge_step(metakern.l2rw_step, given, engine="ghost")


@pytest.mark.parametrize("layer", LAYERS)
def test_in_half_precision(layer: type[nn.RNNBase]) -> None:
    """The steps are repeated in float32; B is as autocast gives it."""
    given = reader(layer, {"batch_first": True})
    model, batches = given.model.float(), [(x.float(), y) for x, y in (given.batch, given.meta_batch)]
    exact = metakern.grad_dots(model, *batches).dots
    with torch.autocast("cpu", torch.bfloat16):
        found = metakern.grad_dots(model, *batches, engine="ghost").dots
    assert F.cosine_similarity(found, exact, dim=0) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS)
def test_by_cudnn_on_a_gpu(layer: type[nn.RNNBase]) -> None:
    for engine in ("ghost", "jvp", "double_backward"):
        judge_step(metakern.l2rw_step, setup(layer, "cuda"), engine=engine)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"engine": "jvp"}, {"memory": "two_pass"}, {"micro_batch": 2}], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_between_layers_on_a_gpu(layer: type[nn.RNNBase], settings: dict[str, Any]) -> None:
    """cuDNN's masks could not be drawn again, so it is left out of such a call; dots and gradient are checked against
    autograd in the step, and here the gradient, with the mask that the step has drawn."""
    case = setup(layer, "cuda", dropout=0.5)
    torch.manual_seed(1)
    step = metakern.reweight_step(case.model, case.batch, case.meta_batch, loss_fn=case.loss_fn, **settings)
    torch.manual_seed(1)
    parts = zip(*(t.split(settings.get("micro_batch", 6)) for t in case.batch))
    with repeatable.without_cudnn():
        losses = [case.loss_fn(case.model, part) for part in parts]
    grads = torch.autograd.grad((step.weights * torch.cat(losses)).sum(), list(case.model.parameters()))
    for p, want in zip(case.model.parameters(), grads, strict=True):
        budget.assert_within(p.grad, want, 1.0)
