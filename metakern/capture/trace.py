"""Run a model once and record every place where a trainable parameter meets example data.

The unit of capture is a call of a torch function, not a module. So a user's own layer, a bare parameter, a
parametrised or low-rank weight, a functional call and a subclass are all seen the same way, and the model (except
registered modules) is not wrapped, hooked or changed. What cannot be seen here (a custom autograd.Function that takes
a parameter, a scripted module) is found afterwards by `capture.graph.require_complete`, which raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from metakern.capture.function import Function, function_of, is_in_place, may_write, only_watches
from metakern.capture.independence.row_notes import RowNotes, next_node
from metakern.capture.module_call import PARAMETER, ModuleCall
from metakern.capture.outputs import owner_of, separated, tensors_in, unserved
from metakern.capture.real_parts import RealParts, real_parts
from metakern.capture.record import ArgPath, Call, Trace, Use, place_of, versions_of
from metakern.capture.refusal import EngineUnavailable
from metakern.capture.repeatable import repeatable, watching_randomness
from metakern.capture.state.writes import Writes
from metakern.capture.unrolled import SeeingMode, dispatched, dispatches, unrolled

ADDITIONS = frozenset("add add_ __add__ __radd__ __iadd__".split())


def tensor_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[ArgPath, Tensor]]:
    """Every tensor among the arguments of a call, also inside lists such as those of `cat` and `stack`."""
    return ((ArgPath(key, item), tensor) for key, item, tensor in _tensors(args, kwargs))


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int | str, int | None, Tensor]]:
    """The same as (key, item, tensor). A list, since it runs at every call, and a generator would be slower."""
    found: list[tuple[int | str, int | None, Tensor]] = []
    for key, value in enumerate(args) if not kwargs else (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor):
            found.append((key, None, value))
        elif isinstance(value, (list, tuple)):
            found += [(key, item, inner) for item, inner in enumerate(value) if isinstance(inner, Tensor)]
    return found


class Tracer(SeeingMode):
    """Records uses and derivations of `parameters` while active; the calls themselves run unchanged."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        constants: Sequence[Tensor],
        writes: Writes | None = None,
        rows: bool = True,
    ) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.derivations: list[Call] = []
        self.couplings: list[str] = []
        # By identity; the tensors are held, so that no other tensor can get the same id.
        self._parametric: dict[int, Tensor] = {id(p): p for p in parameters}
        self._derived_versions: dict[int, int] = {}
        self._constant: dict[int, Tensor] = {id(c): c for c in constants}
        self._rows = RowNotes(constants, self._parametric, wanted=rows)
        self._hooked = list[GradientEdge]()
        self._writes = writes  # notes writes into parameters, so that they can be undone
        self.paused = False  # inside a registered module, whose call is recorded as a whole

    def trace(self, losses: Tensor) -> Trace:
        noted = tuple(self.uses), tuple(self.derivations), tuple(self.couplings)
        return Trace(losses, *noted, hooked=frozenset(map(place_of, self._hooked)), **self._rows.found())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        function = function_of(func)
        if self._writes is not None and may_write(function, args, kwargs):
            self._writes.before(function, args, kwargs)
        kind = function.kind
        if kind == "metadata" or (self.paused and kind != "call"):
            return func(*args, **kwargs)
        if types and dispatches(types):
            with self:
                return dispatched(func, types, args, kwargs)
        if kind != "call":
            if kind == "unrolled":
                with self:
                    return unrolled(func)(*args, **kwargs)
            if kind == "hook":
                return self._hook(func, args, kwargs)
            if kind == "attribute":  # x.T and x.real: only views of parameters matter here
                return self._attribute(func, args)
            self._note_batch_statistics(args, kwargs)
        rows = self._rows
        if next_node() != rows.next:
            rows.before_call()
        output = self._call(func, function, args, kwargs)
        rows.next = next_node()
        return output

    def _call(self, func: Callable[..., Any], function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.paused:
            return self._call_inside(func, function, args, kwargs)
        known, constant = self._parametric, self._constant
        parametric, data = [], []
        for key, item, tensor in _tensors(args, kwargs):
            if id(tensor) in known:
                self._require_unchanged(tensor)
                parametric.append((ArgPath(key, item), tensor))
            elif tensor.requires_grad or id(tensor) not in constant:
                data.append(tensor)
        if not parametric:
            return self._without_parameters(func, function, args, kwargs, data)
        if function.like_another and len(args) > 1 and isinstance(args[1], Tensor):
            if id(args[0]) not in known:
                return self._without_parameters(func, function, args, kwargs, data)
            args, parametric, data = (args[0], _shape_of(args[1]), *args[2:]), [(ArgPath(0), args[0])], []
        if not torch.is_grad_enabled():
            output = func(*args, **kwargs)
            if not data:
                self._mark_constant(output)
            return output
        if data:
            self._rows.note(function, args, kwargs, data)
            return self._use(func, function, args, kwargs, tuple(parametric), data)
        return self._derivation(func, function, args, kwargs, tuple(parametric))

    def _call_inside(self, func: Any, function: Function, args: Any, kwargs: Any) -> Any:
        """A call inside a registered module."""
        output = repeatable(func, function.name, args, kwargs)
        data = [tensor for _, _, tensor in _tensors(args, kwargs)]
        self._rows.note(function, args, kwargs, data)
        return output

    def _without_parameters(self, func: Any, function: Function, args: Any, kwargs: Any, data: list[Tensor]) -> Any:
        output = func(*args, **kwargs)
        if (not data and not function.random_constant) or function.shape_only:
            self._mark_constant(output)
            self._rows.note_constant(function, args, kwargs, output)
            return output
        if args and is_in_place(function, args, kwargs):
            self._constant.pop(id(args[0]), None)  # data was written into it
            self._rows.note_write()
        self._rows.note(function, args, kwargs, data, in_graph=True)
        return output

    def _derivation(self, func: Any, function: Function, args: Any, kwargs: Any, parametric: Any) -> Any:
        if is_in_place(function, args, kwargs):
            raise EngineUnavailable(
                f"a tensor derived from parameters is changed in place by {function.name}(); write it out of place for "
                "engine='ghost' (engine='jvp' handles it as it is)"
            )
        output, state = watching_randomness(func, function, args, kwargs)
        # A no-op such as `contiguous` returns its argument, which is known already.
        outputs = tuple([t if t.requires_grad and id(t) not in self._parametric else None for t in tensors_in(output)])
        self._mark_constant(output)
        if any(o is not None for o in outputs):
            self._add_derivation(Call(func, function.name, args, kwargs, parametric, outputs, False, state))
        return output

    def _add_derivation(self, call: Call) -> None:
        for tensor in call.outputs:
            if tensor is not None:
                self._parametric[id(tensor)] = tensor
                self._derived_versions[id(tensor)] = tensor._version
        self.derivations.append(call)

    def _use(self, func: Any, function: Function, args: Any, kwargs: Any, parametric: Any, data: list[Tensor]) -> Any:
        name, in_place = function.name, is_in_place(function, args, kwargs)
        if in_place and (id(args[0]) in self._parametric or id(args[0]) in self._constant or "out" in kwargs):
            raise EngineUnavailable(
                f"{name}() writes example data into a tensor of parameters or constants in place; use torch.cat or "
                "torch.where for engine='ghost' (engine='jvp' handles it as it is)"
            )
        upstream = tuple([t.grad_fn for t in data if t.grad_fn is not None])
        kept, versions = args, versions_of(data)
        if name in ADDITIONS:
            versions = ()  # the derivative of a sum does not depend on its terms
        elif in_place:  # a replay needs the value before the call, which is overwritten
            kept = (args[0].detach().clone(), *args[1:])
            versions = tuple([(t, version) for t, version in versions if t is not args[0]])
        output, state = watching_randomness(func, function, args, kwargs)
        call = Call(func, name, kept, kwargs, parametric, (), in_place, state, _autocast(data[0]), versions)
        if in_place:
            self._note(call, args[0], data, upstream)
            return output
        if isinstance(output, Tensor) and output.is_complex():
            parts = real_parts(output)
            self._note(call._replace(func=RealParts(func)), parts, data, upstream)
            return torch.view_as_complex(parts)
        output = separated(output, upstream)
        self._note(call, output, data, upstream)
        return output

    def _note(self, call: Call, output: Any, data: list[Tensor], upstream: tuple[Any, ...]) -> None:
        """Add a use if any of its outputs carries a gradient."""
        found = self._made(call, output)
        if found:
            places, tensors = zip(*found)
            if any([t.is_complex() or t.is_nested for t in tensors]):
                raise EngineUnavailable(unserved(call.name, tensors))
            edges = tuple([get_gradient_edge(t if call.in_place else owner_of(t, data)) for t in tensors])
            self.uses.append(Use(call, edges, places, tuple([t.shape for t in tensors]), upstream))

    def _made(self, call: Call, output: Any) -> list[tuple[int, Tensor]]:
        """Outputs that carry a gradient, by place; not arguments that are returned unchanged (`atleast_2d`)."""
        known, same = self._parametric, {id(t) for t, version in call.versions if t._version == version}
        return [
            (place, t)
            for place, t in enumerate(tensors_in(output))
            if t.requires_grad and id(t) not in known and id(t) not in same
        ]

    def note_module(self, module: ModuleCall, args: Any, kwargs: Any, output: Any, state: Any) -> Any:
        """Add the call of a registered module as one use of all its trainable parameters; returns its output."""
        named = {PARAMETER + name: p for name, p in module.module.named_parameters() if id(p) in self._parametric}
        data = [t for _, t in tensor_arguments(args, kwargs)]
        self._rows.note_module(args, kwargs, data)
        if not named or not data:
            return output
        parametric = tuple((ArgPath(key), p) for key, p in named.items())
        upstream = tuple(t.grad_fn for t in data if t.grad_fn is not None)
        versions = versions_of(data)
        call = Call(
            module,
            module.__name__,
            args,
            {**kwargs, **named},
            parametric,
            (),
            False,
            rng_state=state,
            autocast=_autocast(data[0]),
            versions=versions,
        )
        output = separated(output, upstream)
        self._note(call, output, data, upstream)
        return output

    def _attribute(self, func: Any, args: tuple[Any, ...]) -> Any:
        output = func(*args)
        if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
            return output
        source = args[0]
        if id(source) not in self._parametric:
            if id(source) in self._constant:
                self._mark_constant(output)
            return output
        if output.requires_grad and output is not source and torch.is_grad_enabled():
            self._add_derivation(Call(func, "__get__", args, {}, ((ArgPath(0), source),), (output,), False))
        self._mark_constant(output)
        return output

    def _hook(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pass registers a hook on a tensor: note it, since a hook on the output of a use changes B."""
        if only_watches(*args[1:], **kwargs):
            return func(*args, **kwargs)
        if id(args[0]) in self._parametric:
            raise EngineUnavailable(
                "the forward pass puts a hook on the gradient of a parameter, or of a tensor derived from parameters, "
                "which may change the gradient of every example; do that to `.grad` after the step instead"
            )
        if args[0].requires_grad:
            self._hooked.append(get_gradient_edge(args[0]))
            self._rows.numbers.append("hook")
        return func(*args, **kwargs)

    def _mark_constant(self, output: Any) -> None:
        for tensor in tensors_in(output):
            if not tensor.requires_grad:
                self._constant[id(tensor)] = tensor

    def _require_unchanged(self, tensor: Tensor) -> None:
        version = self._derived_versions.get(id(tensor))
        if version is not None and tensor._version != version:
            raise EngineUnavailable(
                f"a tensor of shape {tuple(tensor.shape)} derived from parameters was changed in place after it was "
                "made; write it out of place for engine='ghost' (engine='jvp' handles it as it is)"
            )

    def _note_batch_statistics(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        if training:
            self.couplings.append("batch_norm in training mode takes its statistics over the batch")


def _shape_of(tensor: Tensor) -> Tensor:
    """One element expanded to the shape and dtype of `tensor`: all that `bias.expand_as(hidden)` needs of `hidden`."""
    return tensor.detach().new_empty(()).expand(tensor.shape)


def _autocast(tensor: Tensor) -> tuple[str, torch.dtype] | None:
    kind = tensor.device.type
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
