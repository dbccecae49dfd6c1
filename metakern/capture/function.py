"""What is known about a torch function by its name: looked up once, used at every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from metakern.capture.independence.reordering import ENTRY_BY_ENTRY, KEEPS_ROWS, REORDERING

# Called on tensors all the time and never part of a gradient.
_METADATA = frozenset(
    getattr(Tensor, name)
    for name in "size dim numel stride storage_offset data_ptr is_contiguous is_floating_point is_complex "
    "element_size ndimension nelement get_device is_same_size __len__ __repr__ __hash__".split()
) | frozenset(
    getattr(Tensor, name).__get__
    for name in "shape ndim dtype device layout requires_grad is_leaf is_cuda is_sparse is_nested".split()
)

# Made from a tensor's shape, device or dtype only: constants, although a tensor is among the arguments.
_SHAPE_ONLY = frozenset(
    f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
) | frozenset(f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "tensor"))

# They use only the shape, or the dtype, of a second tensor.
_LIKE_ANOTHER = frozenset("expand_as view_as reshape_as type_as to".split())

# Frequent calls that never draw random numbers; for all others the generators are compared before and after.
_DETERMINISTIC = frozenset(
    "linear conv1d conv2d conv3d embedding layer_norm rms_norm group_norm batch_norm add mul sub matmul __matmul__ t "
    "transpose permute view reshape expand unsqueeze cat to float __getitem__ chunk split contiguous __rsub__ rsub div "
    "addmm bmm einsum prelu conv_transpose1d conv_transpose2d conv_transpose3d embedding_bag instance_norm pow "
    "neg".split()
)

# Their Python numbers select no rows and set no output sizes.
_ROW_BY_ROW = frozenset(
    "linear matmul __matmul__ __rmatmul__ bmm mm mv addmm embedding relu relu_ gelu silu elu leaky_relu tanh sigmoid "
    "dropout alpha_dropout softplus exp log sqrt rsqrt neg __neg__ sin cos abs square float double half bfloat16 "
    "contiguous clone detach ctc_loss".split()
)

# All numbers that decide what they do are saved by autograd, or are sizes of their inputs.
_TOLD_BY_GRAPH = frozenset(
    "softmax log_softmax sum mean cat stack transpose permute t unsqueeze squeeze unbind chunk split layer_norm "
    "group_norm max_pool1d max_pool2d avg_pool2d conv1d conv2d".split()
)

# Views and casts: if their input is the same in every pass, so is their output.
_STATIC = frozenset("unsqueeze view reshape expand flatten to long int contiguous".split())

_IN_PLACE_OPERATORS = frozenset(
    "__iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __ipow__ __iand__ __ior__ __ixor__ __imatmul__ "
    "__setitem__ __delitem__".split()
)

# Namespaces of operators whose names say what they do, as for torch's functions.
_NAMESPACES = frozenset(("aten", "prims", "metakern"))

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

# They clip the rows that they look up to `max_norm`.
_TABLES = frozenset((F.embedding, F.embedding_bag))

_STATISTICS = {
    F.batch_norm: slice(1, 3),
    F.instance_norm: slice(1, 3),
    torch.batch_norm: slice(3, 5),
    torch.instance_norm: slice(3, 5),
    torch.native_batch_norm: slice(3, 5),
}

# Written in Python around several calls that each take parameters; the body is traced, not the call as a whole.
_UNROLLED = {F.multi_head_attention_forward}


class Function(NamedTuple):
    """What tracing needs to know about a torch function."""

    name: str
    kind: str  # "call"; "metadata", "unrolled", "attribute", "batch_norm" and "hook" are each handled separately
    shape_only: bool
    like_another: bool  # reads only shape or dtype of its second tensor
    random_constant: bool  # makes a tensor of random numbers
    deterministic: bool
    in_place: bool
    may_reorder: bool  # may select rows; `picked_dims` knows its arguments
    may_pick: bool  # may select rows by integer, boolean or sparse arguments
    opaque: bool  # not torch's own: may select rows by any argument
    numbered: bool  # Python numbers among its arguments may select rows or set sizes
    told_by_graph: bool  # its graph node keeps all these numbers
    static: bool  # its output is the same in every pass if its input is
    inplace_at: int | None  # position of its argument `inplace`
    statistics: slice | None  # positions of the running statistics that it may update
    table: bool  # a look-up, which rewrites its table if `max_norm` is set
    mutates: tuple[tuple[int, str], ...]  # arguments that an operator writes into by its schema, by place and name
    writes: bool  # may write into an argument without being told by `inplace` or `out`


@lru_cache(4096)  # bounded, since closures are looked up as well
def function_of(func: Callable[..., Any]) -> Function:
    """The `Function` of a callable that torch hands to a function mode."""
    name = getattr(func, "__name__", "")
    mutates = _mutates(func)
    in_place = name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    in_place |= any(place == 0 for place, _ in mutates)
    statistics, opaque = _STATISTICS.get(func), not _is_known(func)
    return Function(
        name=name,
        kind=_kind(func, name),
        shape_only=name in _SHAPE_ONLY,
        like_another=name in _LIKE_ANOTHER,
        random_constant=name.startswith("rand"),
        deterministic=name in _DETERMINISTIC,
        in_place=in_place,
        may_reorder=name in REORDERING and not opaque,
        may_pick=name not in REORDERING and name not in KEEPS_ROWS and not opaque,
        opaque=opaque,
        numbered=opaque or (name not in ENTRY_BY_ENTRY and name not in _ROW_BY_ROW),
        told_by_graph=not opaque and (name in KEEPS_ROWS or name in _TOLD_BY_GRAPH),
        static=name in _STATIC,
        inplace_at=_inplace_at(func),
        statistics=statistics,
        table=func in _TABLES,
        mutates=mutates,
        writes=any((in_place and name != "requires_grad_", func == _SET_DATA, func in _TABLES, statistics, mutates)),
    )


def is_in_place(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if function.in_place:
        return True
    if function.inplace_at is not None and len(args) > function.inplace_at:
        return bool(args[function.inplace_at])
    return bool(kwargs) and (kwargs.get("out") is not None or kwargs.get("inplace") is True)


def may_write(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may write into an argument (`written_by` tells which); cheap, since it runs at every call."""
    told = bool(kwargs) or function.inplace_at is not None
    return function.writes or (told and is_in_place(function, args, kwargs) and function.name != "requires_grad_")


def written_by(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that a call writes into, tensors or lists of them."""
    found = [kwargs.get("out")]
    if function.mutates:
        found += [args[place] if place < len(args) else kwargs.get(name) for place, name in function.mutates]
    elif is_in_place(function, args, kwargs) or (function.name == "__set__" and function.writes):
        found += args[:1] or [kwargs.get("input")]
    elif function.statistics is not None:
        found += [*args[function.statistics], kwargs.get("running_mean"), kwargs.get("running_var")]
    elif function.table and (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None:
        found.append(args[1] if len(args) > 1 else kwargs["weight"])
    return found


def only_watches(hook: Any) -> bool:
    """Whether a hook on a tensor is from `torch.autograd.graph.register_multi_grad_hook`, which FLOP counters use."""
    return getattr(hook, "__module__", "") == "torch.autograd.graph"


def _is_known(func: Callable[..., Any]) -> bool:
    """Whether it is a function of torch, or our own. Operators of extensions live in `torch._ops` as well."""
    module = getattr(func, "__module__", None) or "torch"
    if module.startswith("torch._ops."):
        return module.split(".")[2] in _NAMESPACES
    return module.split(".")[0] in ("torch", "metakern")


def _mutates(func: Callable[..., Any]) -> tuple[tuple[int, str], ...]:
    """The arguments that an operator writes into, by place and name; those of all its overloads if it names none."""
    if isinstance(func, OpOverload):
        overloads = [func]
    elif isinstance(func, OpOverloadPacket):
        overloads = [getattr(func, name) for name in func.overloads()]
    else:
        return ()
    arguments = [entry for overload in overloads for entry in enumerate(overload._schema.arguments)]
    found = ((place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return tuple(dict.fromkeys(found))


def _inplace_at(func: Callable[..., Any]) -> int | None:
    code = getattr(func, "__code__", None)
    names = () if code is None else code.co_varnames[: code.co_argcount]
    return names.index("inplace") if "inplace" in names else None


def _kind(func: Callable[..., Any], name: str) -> str:
    if func in _METADATA:
        return "metadata"
    if func in _UNROLLED:
        return "unrolled"
    return {"__get__": "attribute", "batch_norm": "batch_norm", "register_hook": "hook"}.get(name, "call")
