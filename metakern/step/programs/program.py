"""A step as a program of torch's operators: traced once, compiled, and not used if a batch takes another branch.

Values that the host reads during tracing (is this loss finite? which branch?) determine the program. Every run
recomputes them; if one of them differs, the run reports it, and its results are discarded.

A function that yields more than once becomes a program in parts, between which the host does what no program can, such
as letting an optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metakern.capture.layout import is_sparse
from metakern.capture.refusal import EngineUnavailable
from metakern.step.programs.draws import Draws
from metakern.step.programs.program_parts import cut

Backend = Callable[[fx.GraphModule, list[Tensor]], Callable[..., tuple[Tensor, ...]]]


def compiler_of(backend: str | Backend) -> Backend:
    """The backend of that name, or the function itself."""
    from torch._dynamo.exc import InvalidBackend  # here: only compiled steps need it

    expected = "the name of a backend of torch.compile, such as 'inductor', or a function"
    if not isinstance(backend, str) and not callable(backend):
        raise TypeError(f"backend must be {expected}; got {type(backend).__name__}")
    try:
        return torch._dynamo.lookup_backend(backend)
    except InvalidBackend as error:
        raise ValueError(f"backend must be {expected}; got {backend!r}") from error


_MAKERS = frozenset(("tensor", "as_tensor", "asarray", "new_tensor", "new"))
_EXPORTS = frozenset(("numpy", "tolist", "__array__", "__dlpack__"))
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
_READ, _EQUAL = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default
_PACK = torch.ops.aten._pack_padded_sequence.default


class Program:
    """A function of tensors as a graph of torch's operators; runs as traced until it is compiled.

    Parameters and any other tensors that it uses are read again in every run.
    """

    def __init__(self, graph: fx.GraphModule, sizes: Sequence[int], tensors: Sequence[Tensor]) -> None:
        self._constants, self._tensors = _constants_as_inputs(graph), tensors
        self._inputs = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        self._parts = cut(graph, sizes)
        self._run: list[Callable[..., Sequence[Tensor]]] = [part.graph for part in self._parts]

    def compile(self, backend: Backend) -> None:
        """Compile it with a backend of torch.compile."""
        with _as_it_stands():
            values = self._start(self._tensors)
            for k, part in enumerate(self._parts):
                given = [values[name] for name in part.given]
                if k + 1 < len(self._parts):  # example inputs of the next part
                    part.keep(values, part.graph(*given))
                self._run[k] = backend(part.graph, given)

    def __call__(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor] | None]:
        """What the function yields, part by part.

        None, and nothing after it, if a value that determined the program differs from the traced one.
        """
        values = self._start(tensors)
        for part, run in zip(self._parts, self._run, strict=True):
            with _as_it_stands():
                found = run(*(values[name] for name in part.given))
            if not bool(found[part.results]):
                yield None
                return
            part.keep(values, found)
            yield list(found[: part.results])

    def _start(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._inputs, [*tensors, *self._constants], strict=True))


@contextmanager
def _as_it_stands() -> Iterator[None]:
    """Run the graph without gradients and autocast: it contains its own derivatives and casts, and autocast around a
    run would cast again, even what the step keeps out of autocast.
    """
    with torch.no_grad(), torch._C._DisableAutocast():
        yield


def traced(function: Callable[..., Iterator[list[Tensor]]], tensors: Sequence[Tensor]) -> Program:
    """What `function(*tensors)` yields, as a program.

    Raises: NotImplementedError if the function reads numbers from tensors, or makes tensors whose size depends on them.
    """
    sizes: list[int] = []

    def recorded(*given: Tensor) -> list[Tensor]:
        reads, found = _Reads(), list[Tensor]()
        with _Untraceable(reads), reads, Draws():
            for results in function(*given):
                sizes.append(len(results))
                found += [*results, reads.as_traced(given[0].device)]
            return found

    _require_strided(tensors)
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False):  # compiled code inside is traced uncompiled
        graph = make_fx(recorded)(*tensors)
    return Program(graph, sizes, tensors)


class _Reads(TorchDispatchMode):
    """Gives the host the booleans and integers that it reads, and remembers where they came from."""

    def __init__(self) -> None:
        super().__init__()
        self._read: list[tuple[Tensor, int | bool | Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ:
            return self._value(args[0])
        if func is _EQUAL:
            return args[0].shape == args[1].shape and bool(self._value((args[0] == args[1]).all()))
        if func is _PACK or (torch.Tag.dynamic_output_shape in func.tags and not _by_numbers(func, args)):
            raise EngineUnavailable(
                f"{func.name()} makes a tensor whose size depends on values, which a compiled step cannot do; "
                "run the step uncompiled"
            )
        if torch.Tag.data_dependent_output in func.tags:
            raise EngineUnavailable(f"{func.name()} reads numbers from a tensor; run the step uncompiled")
        return func(*args, **(kwargs or {}))

    def _value(self, tensor: Tensor) -> int | bool:
        if tensor.is_floating_point() or tensor.is_complex():
            raise EngineUnavailable(
                "the step reads a floating point number from a tensor (item(), float()); keep it a tensor, or "
                "run the step uncompiled"
            )
        with disable_proxy_modes_tracing():
            value = tensor.item()
        assert not isinstance(value, float)
        self._read.append((tensor, value))
        return value

    def keep(self, tensor: Tensor) -> None:
        """Tie the program to the values of a tensor that C++ reads out of sight."""
        with disable_proxy_modes_tracing():
            self._read.append((tensor, tensor.clone()))

    def as_traced(self, device: torch.device) -> Tensor:
        """Whether every value read since the last call has, in this run, the value it had when traced, []."""
        same = torch.ones((), dtype=torch.bool, device=device)
        for tensor, value in self._read:
            same = same & (tensor == value).all().to(device)
        self._read = []
        return same


def _by_numbers(func: Any, args: Any) -> bool:
    """Indexing by integers gives the size of the index; by booleans, a size that depends on their values."""
    return func is torch.ops.aten.index.Tensor and not any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


class _Untraceable(TorchFunctionMode):
    """Rejects numbers that leave torch, which would silently become constants of the program, and sparse tensors, which
    fail in many operators, each with an error of its own; ties the program to the lengths of packed sequences.
    """

    def __init__(self, reads: _Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _EXPORTS:
            raise EngineUnavailable(
                f"the step takes numbers out of torch (Tensor.{func.__name__}), which a compiled step would not "
                "repeat; run the step uncompiled"
            )
        if _reads_tensors(func, args):
            raise EngineUnavailable(
                f"the step takes numbers out of tensors ({func.__name__}), which a compiled step would not repeat; "
                "make the new tensor by torch.stack, or run the step uncompiled"
            )
        _require_strided(args)
        if _is_packed(func, args):
            self._reads.keep(args[1])
        return func(*args, **(kwargs or {}))


def _is_packed(func: Any, args: Sequence[Any]) -> bool:
    """Whether the call takes a packed sequence: its rows, and then how many examples each time step has, on the CPU."""
    name = getattr(func, "__name__", "")
    return name == "_pad_packed_sequence" or (
        name in _RECURRENT and isinstance(args[1], Tensor) and not args[1].is_floating_point()
    )


def _reads_tensors(func: Any, args: Sequence[Any]) -> bool:
    """Whether the call reads tensors in C++, out of sight: in lists that become a tensor, and as places to split at."""
    name = getattr(func, "__name__", "")
    if name == "tensor_split":
        return any(isinstance(value, Tensor) for value in args[1:])
    lists = [value for value in args if isinstance(value, (list, tuple))] if name in _MAKERS else []
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(lists))


def _require_strided(values: Sequence[Any]) -> None:
    if any(isinstance(value, Tensor) and is_sparse(value) for value in values):
        raise EngineUnavailable(
            "the step reads a sparse tensor, which torch can only partly trace and compile; run the step uncompiled"
        )


def _constants_as_inputs(graph: fx.GraphModule) -> list[Tensor]:
    """Turn tensors that the graph holds into inputs, after the others, so that they are read in every run."""
    found: dict[str, fx.Node] = {}
    constants: list[Tensor] = []
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in found:
            with graph.graph.inserting_after(places[-1]):
                places.append(graph.graph.placeholder(f"held_{len(constants)}"))
            constants.append(getattr(graph, node.target))
            found[node.target] = places[-1]
            places[-1].meta = dict(node.meta)
        node.replace_all_uses_with(found[node.target])
        graph.graph.erase_node(node)
    graph.recompile()
    return constants
