"""An implicit virtual step: run the meta batch at theta^ = theta0 - k sum_n c_n g_n without forming it.

For a weight W of a linear layer with records A, B of the train batch and inputs A' of the meta batch,

    A' W^^T + b^ = A' W0^T + b0 - (k A' A^T + k_b) diag(c) B

which includes the bias, if it is used nowhere else. With few meta rows the two thin products cost far less than the
weighted gradient, and so do those of autograd's backward pass. The same backward pass gives the dots of both:
<g_n, k g_meta(theta^)> = -d meta_loss/dc_n, where c is a leaf of the product. All other parameters move explicitly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from metakern.capture.layout import is_sparse
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.trace import tensor_arguments, tensors_in
from metakern.capture.unrolled import LastingMode
from metakern.dots import pairable, pairable_biases
from metakern.dots.pairs import GRAM_OVERHEAD
from metakern.engines.problem import Problem
from metakern.engines.recorded import Recorded
from metakern.layers.linear import matrices


class VirtualOrigin(Protocol):
    """theta0 and the numbers k by name of the parameter."""

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    @property
    def jacobian(self) -> Mapping[str, float | Tensor]: ...


@dataclass(frozen=True)
class Move:
    """How a weight and its bias move: W^ = W0 - k sum_r c_r B_r^T A_r, b^ = b0 - k_b sum_r c_r B_r over train rows."""

    inputs: Tensor  # A, [rows, i]
    grads: Tensor  # B, [rows, o]
    coefficients: Tensor  # c of the example of every row, [rows, 1], with a graph to c
    origin: Tensor  # W0, [o, i]
    factor: float | Tensor  # k
    bias: nn.Parameter | None  # the bias that moves along
    bias_origin: Tensor | None  # b0, [o]
    bias_factor: float | Tensor  # k_b


class ImplicitUse(NamedTuple):
    """Index of the use of a weight in the train pass, and the name of the bias that moves along."""

    index: int
    bias: str | None


def implicit_weights(problem: Problem, train: Recorded) -> dict[str, ImplicitUse]:
    """Names of the weights for which it is cheaper not to form W^ -> their use in the train pass."""
    names = {id(p): name for name, p in problem.chosen.items()}
    candidates = pairable(train.trace, problem.chosen_by_identity)
    biases = pairable_biases(train.trace, candidates)
    found = {}
    for key, k in candidates.items():
        use = train.trace.uses[k]
        if use.call.func is F.linear and train.records[k] is not None:
            rows = use.output_shapes[0][:-1].numel()
            if implicit_is_cheaper(rows, rows * problem.meta_share, *use.call.argument(1, "weight").shape):
                found[names[key]] = ImplicitUse(k, names.get(id(biases.get(key))))
    return found


def implicit_is_cheaper(rows: float, meta_rows: float, outputs: int, inputs: int) -> bool:
    """Compare multiplications: thin products forward and backward, against forming W^ and V and the dots along V."""
    thin = rows * meta_rows * 2 * (inputs + outputs + GRAM_OVERHEAD)
    return thin < (2 * rows + meta_rows) * inputs * outputs


def move(
    problem: Problem, train: Recorded, name: str, use: ImplicitUse, origin: VirtualOrigin, coefficients: Tensor
) -> Move:
    """The `Move` of one weight, for the meta pass; it is differentiable in the coefficients c, [n]."""
    record = train.records[use.index]
    assert record is not None
    a, b = matrices(record, coefficients.shape[0])
    shape = record.output_grad.shape[:-1]
    c = record.axes[0].spread(coefficients, shape).expand(shape).reshape(-1, 1).to(b.dtype)
    rows = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), c
    weight = origin.parameters[name].detach(), origin.jacobian[name]
    if use.bias is None:
        return Move(*rows, *weight, None, None, 0.0)
    bias = origin.parameters[use.bias].detach(), origin.jacobian[use.bias]
    return Move(*rows, *weight, problem.chosen[use.bias], *bias)


class Moving(LastingMode):
    """Linear layers behave as if weight and bias had moved; `weights` by identity of the weight.

    If one of these still gets a gradient, that comes from an unseen use. Uses seen but not handled are recorded.
    """

    def __init__(self, weights: Mapping[int, Move]) -> None:
        super().__init__()
        self._weights, self._unserved = weights, ""
        self._moving = {*weights, *(id(move.bias) for move in weights.values() if move.bias is not None)}

    def moves(self, parameter: Tensor) -> bool:
        return id(parameter) in self._moving

    def require_served(self) -> None:
        """Raise EngineUnavailable if the values of a moved weight were used in another way."""
        if self._unserved:
            raise EngineUnavailable(f"{self._unserved} reads a weight whose virtual step is not formed")

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        met = {id(tensor) for _, tensor in tensor_arguments(args, kwargs)} & self._moving
        if not met:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        if func is F.linear and id(given["weight"]) in met:
            move, bias = self._weights[id(given["weight"])], given.get("bias")
            if met == {id(given["weight"]), id(bias)} and bias is move.bias:
                return _moved(given["input"], move, move.bias_origin, move.bias_factor)
            if met == {id(given["weight"])}:
                return _moved(given["input"], move, bias, 0.0)
        output = func(*args, **kwargs)
        # Its shape or dtype may be read; its values may not, with or without a gradient.
        if tensors_in(output):
            self._unserved = getattr(func, "__name__", str(func))
        return output


def _moved(x: Tensor, move: Move, bias: Tensor | None, bias_factor: float | Tensor) -> Tensor:
    """x W^^T + b^. The Gram matrix is [rows, meta rows]: the library is faster in this order."""
    output = F.linear(x, move.origin, bias)
    x = x.to_dense() if is_sparse(x) else x
    gram = move.inputs @ x.to(move.inputs.dtype).reshape(-1, x.shape[-1]).t()
    change = ((move.factor * gram + bias_factor) * move.coefficients).t() @ move.grads
    return output - change.to(output.dtype).view(output.shape)
