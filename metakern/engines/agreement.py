"""The first batch of a structure is checked against a plain backward pass, so that no engine is silently wrong.

For numbers u_n that are independent of the batch, autograd alone gives, through the graph of the same pass,

    G = d/dtheta sum_n u_n l_n        and an engine must agree:   sum_n u_n <dl_n/dtheta, R> = <G, R>
                                                                  sum_n u_n dl_n/dtheta = G

The direction R is G with each parameter scaled to length one, except small ones, so that all count and none cancel.
Proofs of independence say which forms apply; this check says that they did, with the installed torch: bugs in torch,
and anything hidden from a trace, show up here. It costs a backward pass, the dots and a weighted gradient once more,
and the memory of two gradients, once per model, structure and engine, and a few times more where a gradient was zero;
in forward mode, which has no trace to distinguish structures, once per model, loss function and mode of its modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from metakern.capture.graph import computes_in
from metakern.capture.host import may_look_at_values
from metakern.capture.refusal import EngineUnavailable
from metakern.engines.problem import Problem
from metakern.engines.weighted_backward import weighted_backward
from metakern.layers.table import REGISTRATIONS

_CHECKED = 1, 4, 16, 64
"""Passes that are checked, as long as the gradient of a whole parameter was zero in all before: behind a factor of a
low-rank adapter, or a gate, that is zero at first, rules are not seen to be right in the first step."""


class _Agreed(NamedTuple):
    """How many passes there have been, and the parameters about which none has told anything."""

    passes: int
    silent: frozenset[str]


_VERDICTS: WeakKeyDictionary[nn.Module, dict[Hashable, str | _Agreed]] = WeakKeyDictionary()
"""By model, then by engine and structure: why it is rejected, or what is known."""

SMALL = 1e-2
"""The share of |G| below which a parameter gets less than length one: its gradient may be rounding alone, like that of
a bias before a normalisation. In half precision, where autograd itself rounds sums, all count by their share.
"""
_AT_ONCE = 1 << 20  # numbers that are converted to float64 at a time


class Expected:
    """What autograd computes for a batch, to compare an engine with."""

    def __init__(
        self,
        problem: Problem,
        outputs: Tensor,
        key: Hashable,
        form: Callable[[], AbstractContextManager[Any]],
        share: float,
        small: float,
    ) -> None:
        self._model, self._key, self._share = problem.model, key, share
        generator = torch.Generator("cpu").manual_seed(0)
        self.numbers = torch.randn(outputs.shape, generator=generator, device="cpu").to(outputs)
        with torch.autograd.set_detect_anomaly(False):
            found = weighted_backward(problem, outputs, self.numbers, keep=True, only=problem.trainable, form=form)
        self._gradient = {name: _plain(g) for name, g in found.items()}
        lengths = {name: _norm(g) for name, g in self._gradient.items()}
        self._size = math.hypot(*lengths.values())
        self._least = small * self._size
        self._scales = {name: max(length, self._least) for name, length in lengths.items()}
        counted = [name for name in problem.chosen if lengths.get(name)]
        self._silent = frozenset(problem.chosen).difference(counted)
        self._telling = [name for name in counted if lengths[name] > SMALL * self._size]
        self._finite = True
        self.direction = {name: self._gradient[name] / self._scales[name] for name in counted}
        self._along = sum(lengths[name] ** 2 / self._scales[name] for name in counted)

    def require_dots(self, dots: Tensor) -> None:
        """Raise EngineUnavailable unless these are the dots along `direction`; they have the shape of the outputs."""
        self._require(abs(_inner(self.numbers, dots) - self._along), self._along, "the sum of the dots")
        if self._finite:
            verdicts = _VERDICTS.setdefault(self._model, {})
            known = verdicts.get(self._key)
            passes, silent = known if isinstance(known, _Agreed) else (0, self._silent)
            verdicts[self._key] = _Agreed(passes + 1, silent.difference(self._telling))

    def require_gradient(self, found: Mapping[str, Tensor]) -> None:
        """Raise EngineUnavailable unless this is the gradient for weights that are `numbers`."""
        for name, gradient in found.items():
            known = self._gradient.get(name)
            apart = _norm(_plain(gradient) if known is None else _plain(gradient) - known)
            self._require(apart, self._scales.get(name, self._least), f"the gradient of '{name}'")

    def require_same(self, dots: Tensor, directed: Tensor, v: Iterable[Tensor], what: str) -> None:
        """Raise EngineUnavailable unless dots in another form are those along the same V."""
        most = float(directed.abs().max()) + SMALL * self._size * math.hypot(*map(_norm, v))
        self._require(float((dots - directed).abs().max()), most, what)

    def forget(self) -> None:
        """Free the tensors that are as large as the parameters."""
        self._gradient, self.direction = {}, {}

    def _require(self, apart: float, size: float, what: str) -> None:
        if not math.isfinite(apart + size):  # such values tell nothing, but those of the next pass may
            self._finite = False
        elif apart > self._share * size:
            _VERDICTS.setdefault(self._model, {})[self._key] = reason = (
                f"{what} disagrees with a plain backward pass over the same batch (by {_share_of(apart, size):.1e} of "
                f"its size): a rule given to register_layer, torch {torch.__version__} or metakern has a derivative of "
                "this model wrong. Unless it is the first, please report the model; engine='double_backward' uses "
                "autograd alone, at several times the cost"
            )
            raise EngineUnavailable(reason)


def expected(
    problem: Problem,
    outputs: Tensor,
    structure: Hashable,
    form: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Expected | None:
    """What to compare an engine's answers for this pass with; None if earlier passes were checked, if this one tells
    nothing, or if dots are rounded on request. `form`, for forward mode, is the context in which the graph was made.

    Raises: EngineUnavailable if an earlier pass disagreed.
    """
    if not problem.compared or not may_look_at_values():
        return None
    kind = outputs.device, outputs.dtype, next(iter(problem.chosen.values())).dtype
    key = structure, problem.context, problem.memory, tuple(problem.chosen), kind, len(REGISTRATIONS)
    verdicts = _VERDICTS.get(problem.model, {})
    known = verdicts.get(key, _Agreed(0, frozenset()))
    if isinstance(known, str):
        raise EngineUnavailable(known)
    if known.passes and not known.silent:
        return None
    if known.passes + 1 not in _CHECKED:
        verdicts[key] = known._replace(passes=known.passes + 1)
        return None
    fine = not computes_in(outputs, torch.float16, torch.bfloat16)
    share = 0.1 if not fine else 1e-3 if outputs.device.type == "cpu" else 1e-2  # TF32 is usual elsewhere
    small = SMALL if fine else 1.0
    if form is None:
        return Expected(problem, outputs, key, nullcontext, share, small)
    # Other engines contract what the backward pass itself has rounded. Forward mode rounds other numbers, and if losses
    # are near zero, rounding is all that is left of p - 1 (docs/numerics.md, a saturated softmax).
    if float(outputs.detach().abs().max()) < (1e-3 if fine else 0.1):
        return None
    return Expected(problem, outputs, key, form, (10 if fine else 3) * share, small)


def _share_of(apart: float, size: float) -> float:
    return apart / size if size else math.inf


def _plain(gradient: Tensor) -> Tensor:
    """Dense, and a plain Tensor: a subclass may have its own arithmetic."""
    return (gradient.to_dense() if gradient.is_sparse else gradient).as_subclass(Tensor)


def _inner(a: Tensor, b: Tensor) -> float:
    parts = zip(a.detach().reshape(-1).split(_AT_ONCE), b.detach().reshape(-1).split(_AT_ONCE), strict=True)
    return sum(float(_wide(x) @ _wide(y)) for x, y in parts)


def _wide(part: Tensor) -> Tensor:
    """In float64, on the CPU if the device lacks it."""
    return part.double() if part.device.type in ("cpu", "cuda") else part.cpu().double()


def _norm(tensor: Tensor) -> float:
    return _inner(tensor, tensor) ** 0.5
