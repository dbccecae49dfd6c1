"""Ways to use a parameter that a trace of torch functions cannot see: exact by another engine, or refused by name."""

from queue import SimpleQueue
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook
from torch.utils.flop_counter import FlopCounterMode

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.catalogue.structures import Checkpointed
from metakern.testing.judge import Snapshot, judge_step


class Cube(torch.autograd.Function):
    """x * w^3 with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight**3, (grad * x * 3 * weight**2).sum(0)


class CubeLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.linspace(0.5, 1.5, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Cube.apply(x, self.weight))


def setup_of(model: nn.Module) -> Setup:
    return Setup(model.double(), *inputs.pair(6, 3, 4, classes=3))


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_custom_function_on_a_parameter(memory: str) -> None:
    setup = setup_of(CubeLayer())
    before = Snapshot.of(setup.model)
    with pytest.raises(NotImplementedError, match=r"'weight'.*custom autograd"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost", memory=memory)
    before.assert_unchanged(setup.model)


def test_custom_function_by_what_its_backward_pass_says() -> None:
    """It has no forward mode of its own; its backward is differentiable, so two engines are left."""
    assert judge_step(metakern.l2rw_step, setup_of(CubeLayer())).result.engine == "jvp"
    judge_step(metakern.l2rw_step, setup_of(CubeLayer()), engine="double_backward")


class Opaque(torch.autograd.Function):
    """x^3 with a backward that autograd does not record: its second derivatives are lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with torch.no_grad():
            return 3 * grad * ctx.saved_tensors[0] ** 2


def test_custom_function_whose_backward_is_not_recorded() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.side, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Opaque.apply(self.first(x)) + self.side(x))

    setup = setup_of(Model())
    judge_step(metakern.l2rw_step, setup, engine="ghost")
    before = Snapshot.of(setup.model)
    with pytest.raises(NotImplementedError, match="Opaque, cannot be differentiated again"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="double_backward")
    with pytest.raises(NotImplementedError, match="Opaque, cannot be differentiated again"):
        metakern.metabalance_step(setup.model, setup.batch, setup.meta_batch, inner_lr=0.1)
    before.assert_unchanged(setup.model)
    for hessian, order in (("central_difference", 2), ("double_backward", 1)):
        metakern.metabalance_step(
            setup.model, setup.batch, setup.meta_batch, inner_lr=0.1, hessian=hessian, order=order
        )


def test_custom_function_on_data_only() -> None:
    """Without a parameter it is nobody's business."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Cube.apply(self.first(x), torch.ones(4, dtype=x.dtype)))

    judge_step(metakern.l2rw_step, setup_of(Model()), engine="ghost")


class Doubling(torch.Tensor):
    """Products with it are twice what torch's function would give, by calls of which the last is torch's own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, Tensor.matmul):
            with torch._C.DisableTorchFunctionSubclass():
                return 2 * func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    def new_empty(self, *args: Any, **kwargs: Any) -> "Doubling":  # without it the oracle cannot copy the model
        return super().new_empty(*args, **kwargs).as_subclass(Doubling)


@pytest.mark.parametrize("where", ["weight", "matrix", "input"])
def test_subclasses_that_change_what_a_function_does(where: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head, self.matrix = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = x.as_subclass(Doubling) if where == "input" else x
            return self.head(torch.tanh(self.first(x)) @ self.matrix).as_subclass(Tensor)

    torch.manual_seed(0)
    setup = setup_of(Model())
    owner, name = {"weight": (setup.model.first, "weight")}.get(where, (setup.model, "matrix"))
    if where != "input":
        setattr(owner, name, nn.Parameter(getattr(owner, name).detach().as_subclass(Doubling)))
    assert judge_step(metakern.l2rw_step, setup).result.engine == "ghost"


def test_such_a_subclass_by_forward_mode() -> None:
    """The first pass keeps no product that the subclass makes another of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    setup = Setup(model, *inputs.pair(5, 3, 4, classes=3), interacting=True)
    model[3].weight = nn.Parameter(model[3].weight.detach().as_subclass(Doubling))
    before = Snapshot.of(model)
    with pytest.raises(NotImplementedError):
        metakern.l2rw_step(model, setup.batch, setup.meta_batch)
    before.assert_unchanged(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("engine", ["auto", "ghost", "jvp", "double_backward"])
def test_reentrant_checkpoint(engine: str) -> None:
    """Its backward runs a backward of its own, which the engines cannot enter: exact or refused, never short."""
    torch.manual_seed(0)
    setup = setup_of(Checkpointed(reentrant=False))
    truth = setup.oracle()
    setup.model.reentrant = True
    before = Snapshot.of(setup.model)
    try:
        judge_step(metakern.l2rw_step, setup, truth=truth, engine=engine)
    except (NotImplementedError, RuntimeError):
        before.assert_unchanged(setup.model)


def test_parameters_behind_data_and_detach() -> None:
    """`.data` hides a use on purpose: the remaining uses are served, the hidden one counts for nobody."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.first(x)) + x @ self.first.weight.data + x @ self.first.weight.detach())

    judge_step(metakern.l2rw_step, setup_of(Model()), engine="ghost")


def test_weights_from_a_generator_network() -> None:
    """The weight of one layer is computed from parameters of others, and from data."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.generate = nn.Parameter(torch.randn(2)), nn.Linear(2, 12)
            self.per_example = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            shared = torch.tanh(self.generate(self.code)).view(3, 4)
            own = torch.tanh(self.per_example(x)).view(-1, 3, 4)
            return nn.functional.linear(x, shared) + torch.einsum("noi,ni->no", own, x)

    torch.manual_seed(0)
    judge_step(metakern.l2rw_step, setup_of(Hyper()), engine="auto")


def test_functional_call() -> None:
    """Stateless use inside the loss."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        scaled = {name: param * 1.5 for name, param in model.named_parameters()}
        logits = torch.func.functional_call(model, scaled, (batch[0],))
        return nn.functional.cross_entropy(logits, batch[1], reduction="none")

    torch.manual_seed(0)
    setup = setup_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    setup.loss_fn = losses
    judge_step(metakern.l2rw_step, setup, engine="ghost")


def test_regularisers_in_the_loss() -> None:
    """A penalty on the weights in every example's loss reaches the parameters without any example data."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty = sum(param.square().sum() for param in model.parameters())
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") + 0.1 * penalty

    torch.manual_seed(0)
    setup = setup_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    setup.loss_fn = losses
    before = Snapshot.of(setup.model)
    try:
        judge_step(metakern.l2rw_step, setup, engine="ghost")
    except NotImplementedError:
        before.assert_unchanged(setup.model)
    setup.model.zero_grad()
    judge_step(metakern.l2rw_step, setup, engine="auto")


def test_user_hooks_still_fire() -> None:
    """Forward hooks that look on, and that change an output, belong to the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    judge_step(metakern.l2rw_step, setup_of(model), engine="ghost")
    assert 6 in seen
    assert 3 in seen


PLACES = {"tensor": 1, "output of the first layer": 0, "output of a layer": 2}


def hooked(where: str) -> tuple[nn.Module, list[str]]:
    """A network with a hook that changes gradients, and the engines that see it."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    if where == "parameter":
        model[0].weight.register_hook(lambda grad: 2 * grad)
    elif where == "after accumulation":
        model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    elif where == "module":
        model[2].register_full_backward_hook(lambda module, inner, outer: (-inner[0],))
    elif where == "module before":
        model[2].register_full_backward_pre_hook(lambda module, outer: (-outer[0],))
    else:

        def reverse(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda grad: -grad)

        model[PLACES[where]].register_forward_hook(reverse)
    return model, [] if model[0].weight._backward_hooks or "after" in where else ["ghost", "double_backward"]


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
@pytest.mark.parametrize("where", ["parameter", "after accumulation", "module", "module before", *PLACES])
def test_hooks_that_change_gradients(where: str, engine: str, memory: str) -> None:
    """Seen by whatever runs backward; forward mode, and hooks on the parameters themselves, are refused."""
    torch.manual_seed(0)
    model, engines = hooked(where)
    setup = Setup(model, *inputs.pair(4, 3, 4, classes=3))
    if engine in engines:
        judge_step(metakern.l2rw_step, setup, engine=engine, memory=memory)
        return
    before = Snapshot.of(model)
    with pytest.raises(NotImplementedError, match="hook"):
        metakern.l2rw_step(model, setup.batch, setup.meta_batch, engine=engine, memory=memory)
    before.assert_unchanged(model)


def test_a_backward_hook_of_every_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    setup = Setup(model, *inputs.pair(4, 3, 4, classes=3))
    handle = register_module_full_backward_hook(lambda module, inner, outer: tuple(g and 2 * g for g in inner))
    try:
        with pytest.raises(NotImplementedError, match="every module has a backward hook"):
            metakern.l2rw_step(model, setup.batch, setup.meta_batch, engine="jvp")
    finally:
        handle.remove()


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_pairs_of_hooked_layers(memory: str) -> None:
    """Wide layers and one meta example: the pairs form would take the gradient of the output before its hook."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 96), nn.Tanh(), nn.Linear(96, 90), nn.Tanh(), nn.Linear(90, 3)).double()

    def triple(module: nn.Module, given: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: 3 * grad)

    model[2].register_forward_hook(triple)
    judge_step(metakern.l2rw_step, Setup(model, *inputs.pair(3, 1, 4, classes=3)), engine="ghost", memory=memory)


@pytest.mark.parametrize("derived", [False, True])
def test_hooks_on_parameters_inside_the_forward_pass(derived: bool) -> None:
    model = nn.Linear(4, 3).double()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        weight = model.weight * 2 if derived else model.weight
        weight.register_hook(lambda grad: 2 * grad)
        return F.cross_entropy(F.linear(batch[0], weight), batch[1], reduction="none")

    model.bias = None
    with pytest.raises(NotImplementedError, match="puts a hook on the gradient of a parameter"):
        metakern.l2rw_step(model, *inputs.pair(4, 3, 4, classes=3), loss_fn=losses, engine="ghost")


@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
def test_hooks_that_only_watch(engine: str) -> None:
    """A FLOP counter follows the modules by hooks on their tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with FlopCounterMode(display=False) as counter:
        judge_step(metakern.l2rw_step, Setup(model, *inputs.pair(4, 3, 4, classes=3)), engine=engine)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_inside_the_forward_pass_are_numbered_like_it(device: str) -> None:
    """Whether a node belongs to a pass is told by its number, which another thread would count on its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().to(device)
    met: SimpleQueue[tuple[bool, bool]] = SimpleQueue()  # a list would be put back as it was

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, first = batch[0].detach().requires_grad_(), torch._C._autograd._get_sequence_nr()
        logits = model(x)
        (slope,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        within = first < slope.grad_fn._sequence_nr() < torch._C._autograd._get_sequence_nr()
        met.put((within, torch._C._is_multithreading_enabled()))
        return F.cross_entropy(logits, batch[1], reduction="none") + slope.square().sum(1)

    given = [(x.to(device), y.to(device)) for x, y in inputs.pair(6, 3, 4, classes=3)]
    # the slope depends on the weights by what no call shows
    found = metakern.l2rw_step(model, *given, loss_fn=losses)
    assert met.get() == (True, False)
    assert found.engine == "jvp"
    exact = metakern.grad_dots(model, *given, loss_fn=losses, engine="double_backward").dots
    budget.assert_within(found.dots, exact, exact.abs().max())
    assert torch._C._is_multithreading_enabled()
