"""Where rows go: which columns of which later linear a linear's outputs become.

While the model is traced, every tensor that holds a linear's outputs has an *origin*: the row that
each of its entries came from. An operation that moves entries moves the origin with them; one that
works entry by entry keeps it; one that mixes entries along a dimension keeps it where the origin is
constant along that dimension (attention mixes tokens, not the columns of the values). After any
other operation there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_MOVES = {
    getattr(_aten, name)
    for name in (
        "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "squeeze",
        "unsqueeze", "slice", "select", "split", "split_with_sizes", "unbind", "clone", "_to_copy",
        "alias", "detach", "repeat", "flip", "narrow", "unfold",
    )
}  # fmt: skip
_SUMS = {_aten.sum, _aten.mean, _aten.cumsum}
_NORMS = {_aten.native_layer_norm, _aten.native_group_norm, _aten._fused_rms_norm}
_ACTIVATIONS = ("silu", "gelu", "relu", "sigmoid", "tanh", "mish", "softplus", "elu")
_MOST = 8  # origins of one tensor: a tensor with more is not followed


@dataclass(frozen=True, eq=False)
class RowOrigin:
    """The rows that a tensor's entries came from.

    Attributes:
        source: The linear.
        rows: int32, of the tensor's shape; -1 where an entry is from none of its rows.
        activated: Whether an activation function lies between.
    """

    source: Any
    rows: Tensor
    activated: bool = False


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the outputs of linears through a model."""

    def __init__(self, fed: Callable[[Any, Tensor, Any], bool], role: Callable[..., None]) -> None:
        """Follow outputs.

        Args:
            fed: Called with a source, the row that each column came from (-1 for none), and the
                linear that reads the columns; returns whether the source need not be followed on.
            role: Called with a source, rows of it and what they are: q, k, v, gate or up.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._origins: dict[int, list[RowOrigin]] = {}
        self._alive: list[Any] = []  # tensors are identified by address: none is used twice
        self._done: set[Any] = set()
        self._fed, self._role = fed, role

    # -- called by the trace -----------------------------------------------------------------

    def read(self, tensor: Tensor | None, reader: Any) -> None:
        """Note that a linear reads a tensor."""
        for origin in self._of(tensor):
            columns = origin.rows.reshape(-1, origin.rows.shape[-1])[0]
            if self._fed(origin.source, columns, reader):
                self._done.add(origin.source)

    def start(self, tensor: Tensor, source: Any, axis: int) -> None:
        """Note that a linear returned a tensor, with its rows along `axis`."""
        rows = torch.arange(tensor.shape[axis], dtype=torch.int32)
        rows = rows if axis == -1 else rows[:, None]
        self._keep(tensor, [RowOrigin(source, rows.expand(tensor.shape))])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Note that attention returned a tensor `(..., heads, tokens, columns of v)`."""
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            for origin in self._of(tensor):
                self._role(origin.source, origin.rows, name)
        new_origins = []
        for origin in self._of(v):
            rows = origin.rows[..., :1, :]
            if v.dim() > 3 and v.shape[-3] != out.shape[-3]:
                rows = rows.repeat_interleave(out.shape[-3] // v.shape[-3], dim=-3)
            new_origins.append(replace(origin, rows=rows.expand(out.shape)))
        self._keep(out, new_origins)

    # -- operation by operation --------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute, and move the origins along."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        flat = [x for a in args for x in (a if isinstance(a, (list, tuple)) else [a])]
        if not any(id(x) in self._origins for x in flat):
            return result
        # After an operation of a form that is not known here there is no origin.
        with suppress(RuntimeError, IndexError, TypeError, ValueError):
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        packet = func.overloadpacket
        first = args[0]
        if packet in _MOVES:
            self._move(func, args, kwargs, result)
        elif packet in (_aten.cat, _aten.stack):
            self._cat(func, args, kwargs, result)
        elif packet in _NORMS:
            self._keep(result[0], self._of(first))
        elif packet in _SUMS:
            self._sum(func, args, kwargs, result)
        elif packet in (_aten.bmm, _aten.mm):
            self._product(args[0], args[1], result)
        elif (packet is _aten.index and len(args[1]) < first.dim()) or (
            packet is _aten.index_select and args[1] not in (-1, first.dim() - 1)
        ):
            self._keep(result, _of_tokens(self._of(first), result))
        elif packet in (_aten.index_add, _aten.index_add_):
            self._keep(result, [*self._of(first), *_of_tokens(self._of(args[3]), result)])
        elif packet is _aten.convolution and args[8] == first.shape[1] == result.shape[1]:
            same = [s for s in self._of(first) if _same_along(s.rows, (2,))]
            self._keep(
                result, [replace(s, rows=s.rows[..., :1].expand(result.shape)) for s in same]
            )
        elif torch.Tag.pointwise in func.tags:
            self._pointwise(packet, args, result)

    def _move(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.overloadpacket in (_aten.view, _aten._unsafe_view):
            func = torch.reshape  # rows may have other strides than the tensor
        if func is _aten._to_copy.default:
            self._keep(result, self._of(args[0]))
            return
        outs = result if isinstance(result, (list, tuple)) else [result]
        new_origins: list[list[RowOrigin]] = [[] for _ in outs]
        for origin in self._of(args[0]):
            moved = func(origin.rows, *args[1:], **{k: v for k, v in kwargs.items() if k == "dim"})
            for k, rows in enumerate(moved if isinstance(moved, (list, tuple)) else [moved]):
                new_origins[k].append(replace(origin, rows=rows))
        for out, origins in zip(outs, new_origins, strict=True):
            self._keep(out, origins)

    def _cat(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        new_origins = []
        sources = {(s.source, s.activated) for x in args[0] for s in self._of(x)}
        for source, activated in sources:
            parts = []
            for x in args[0]:
                own = [
                    s.rows for s in self._of(x) if (s.source, s.activated) == (source, activated)
                ]
                none = torch.full(x.shape, -1, dtype=torch.int32)
                parts.append(own[0] if own else none)
            new_origins.append(RowOrigin(source, func(parts, *args[1:], **kwargs), activated))
        self._keep(result, new_origins)

    def _sum(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        dims = args[1] if len(args) > 1 else None
        dims = (dims,) if isinstance(dims, int) else tuple(dims or range(args[0].dim()))
        new_origins = []
        for origin in self._of(args[0]):
            if _same_along(origin.rows, dims):
                rows = origin.rows
                if func.overloadpacket is not _aten.cumsum:
                    for d in dims:
                        rows = rows.narrow(d, 0, 1)
                same = rows.numel() == result.numel()
                rows = rows.reshape(result.shape) if same else rows.expand(result.shape)
                new_origins.append(replace(origin, rows=rows))
        self._keep(result, new_origins)

    def _product(self, a: Tensor, b: Tensor, result: Tensor) -> None:
        new_origins = []
        for origin in self._of(b):
            if _same_along(origin.rows, (-2,)):
                new_origins.append(
                    replace(origin, rows=origin.rows[..., :1, :].expand(result.shape))
                )
        for origin in self._of(a):
            if _same_along(origin.rows, (-1,)):
                new_origins.append(replace(origin, rows=origin.rows[..., :1].expand(result.shape)))
        self._keep(result, new_origins)

    def _pointwise(self, packet: Any, args: Any, result: Tensor) -> None:
        activates = any(name in str(packet) for name in _ACTIVATIONS)
        operands = [self._of(x) for x in args if isinstance(x, Tensor)]
        if "mul" in str(packet) and len(operands) == 2:
            self._gate(*operands)
        new_origins = [
            replace(s, rows=s.rows.expand(result.shape), activated=s.activated or activates)
            for origins in operands
            for s in origins
        ]
        self._keep(result, new_origins)

    def _gate(self, one: Iterable[RowOrigin], other: Sequence[RowOrigin]) -> None:
        """Note a gate: rows after an activation function, times rows without one."""
        for a in one:
            for b in other:
                if a.source == b.source and a.activated != b.activated and not a.rows.equal(b.rows):
                    for s in (a, b):
                        self._role(s.source, s.rows, "gate" if s.activated else "up")

    # -- bookkeeping -------------------------------------------------------------------------

    def _of(self, tensor: Any) -> list[RowOrigin]:
        return [s for s in self._origins.get(id(tensor), ()) if s.source not in self._done]

    def _keep(self, tensor: Tensor, origins: Sequence[RowOrigin]) -> None:
        known: list[RowOrigin] = []
        for s in origins:
            same = [x for x in known if x.source == s.source and x.rows.equal(s.rows)]
            if not same:
                known.append(s)
            elif s.activated and not same[0].activated:
                known[known.index(same[0])] = s
        if known and len(known) <= _MOST:
            self._alive.append(tensor)
            self._origins[id(tensor)] = known
        else:
            self._origins.pop(id(tensor), None)


def _same_along(rows: Tensor, dims: Sequence[int]) -> bool:
    return all(
        rows.stride(d) == 0 or rows.shape[d] == 1 or bool((rows == rows.narrow(d, 0, 1)).all())
        for d in dims
    )


def _of_tokens(origins: Sequence[RowOrigin], result: Tensor) -> list[RowOrigin]:
    """Return the origins that are the same for all tokens, for tokens that are picked or moved."""
    new_origins = []
    for origin in origins:
        if _same_along(origin.rows, range(origin.rows.dim() - 1)):
            rows = origin.rows.reshape(-1, origin.rows.shape[-1])[0]
            new_origins.append(replace(origin, rows=rows.expand(result.shape)))
    return new_origins
