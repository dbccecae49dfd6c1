"""dot_precision: the dots may be rounded, and only they."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern import ops
from metakern.layers.precision import direction_dots, products
from metakern.testing.budget import assert_gradient, assert_within
from metakern.testing.inputs import labels, normal
from metakern.testing.oracle import oracle

MODELS = {
    "direction": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 3)),
    "pairs": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 300), nn.Tanh(), nn.Linear(300, 3)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3)),
}
SINGLE = torch.float32
BATCH = (normal(6, 2, 6, 6, dtype=SINGLE), labels(6, classes=3))
META = (normal(2, 2, 6, 6, seed=5, dtype=SINGLE), labels(2, classes=3, seed=5))


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_rounds_the_dots_and_not_the_gradient(name: str, memory: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    exact = metakern.grad_dots(model, BATCH, META, engine="ghost").dots
    result = metakern.l2rw_step(model, BATCH, META, engine="ghost", memory=memory, dot_precision="bf16")
    truth = oracle(model, BATCH, META)
    assert result.dots.dtype == torch.float32
    assert not torch.equal(result.dots, exact)
    # three operands are rounded, and a product of two of them once more
    assert_within(result.dots, truth.dots, 4 * truth.example_norms * truth.meta_norm, dtype=torch.bfloat16, terms=72)
    grads = {parameter: p.grad for parameter, p in model.named_parameters()}
    assert_gradient(grads, truth, weights=result.weights, plain=oracle(model, BATCH, META, dtype=SINGLE))


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp16", "dot_precision must be one of .*'bf16'.*got 'fp16'"),
        ("tf32", "dot_precision='tf32' needs a CUDA device of compute capability 8.0; the model is on cpu"),
        ("fp8", "dot_precision='fp8' needs a CUDA device of compute capability 8.9; the model is on cpu"),
    ],
)
def test_what_cannot_be_is_refused(precision: str, message: str) -> None:
    for step in (metakern.l2rw_step, metakern.grad_dots):
        with pytest.raises(ValueError, match=message):
            step(MODELS["direction"](), BATCH, META, dot_precision=precision)


def test_other_engines_do_not_take_it() -> None:
    with pytest.raises(ValueError, match=r"dot_precision='bf16' is for engine='ghost' .* got 'jvp'"):
        metakern.l2rw_step(MODELS["direction"](), BATCH, META, engine="jvp", dot_precision="bf16")


def test_eight_bits_fill_their_range() -> None:
    """What a GPU would compute, by the reference: a tensor of any size keeps four bits of its entries."""
    A, V, B = 1e-6 * normal(5, 4, 20), 1e3 * normal(7, 20, seed=1), 1e-9 * normal(5, 4, 7, seed=2)
    got = direction_dots("fp8", A, V, B)
    scale = torch.einsum("nti,oi,nto->n", A.abs(), V.abs(), B.abs())
    assert_within(got, ops.direction_dots(A, V, B), 3 * scale, dtype=torch.float8_e4m3fn, terms=80)
    assert direction_dots("fp8", 0 * A, V, B).tolist() == [0] * 5


@pytest.mark.parametrize("operand", ["A", "V"])
def test_eight_bit_operands_come_together(operand: str) -> None:
    operands: dict[str, Tensor] = {"A": normal(2, 3, 4), "V": normal(5, 4), "B": normal(2, 3, 5)}
    operands[operand] = operands[operand].to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="direction_dots: "):
        ops.direction_dots(**operands)


def _tf32() -> tuple[str, ...]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


@pytest.mark.parametrize("own", ["none", "ieee", "tf32"])
def test_tf32_is_allowed_inside_and_as_before_afterwards(own: str) -> None:
    matmul = torch.backends.cuda.matmul
    unset = matmul.fp32_precision
    try:
        matmul.fp32_precision = own
        before = _tf32()
        with products("tf32"):
            assert _tf32() == ("tf32", "tf32", "tf32")
        assert _tf32() == before
        with products("same"):
            assert _tf32() == before
    finally:
        matmul.fp32_precision = unset
