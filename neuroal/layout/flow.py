"""Where rows go: which columns of which later linear a linear's outputs become.

While the model is traced, every tensor that holds a linear's outputs has a *strand* beside it: the
row that each of its entries came from. What moves entries moves the strand, what works entry by
entry keeps it, and what mixes entries along a dimension keeps it where the strand is the same along
that dimension (attention mixes tokens, not the columns of the values). Anything else ends it.
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
_BENDS = ("silu", "gelu", "relu", "sigmoid", "tanh", "mish", "softplus", "elu")
_MOST = 8  # strands of one tensor: what has more sources is no one's


@dataclass(frozen=True, eq=False)
class RowOrigin:
    """The rows that a tensor's entries came from.

    Attributes:
        source: Which linear's.
        rows: int32, of the tensor's shape; -1 where an entry is none of its rows.
        bent: Whether an activation function lies between.
    """

    source: Any
    rows: Tensor
    bent: bool = False


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the outputs of linears through a model."""

    def __init__(self, fed: Callable[[Any, Tensor, Any], bool], role: Callable[..., None]) -> None:
        """Follow outputs.

        Args:
            fed: Told of a source, the row behind each column (-1 for none) and who reads them;
                answers whether the source is done with.
            role: Told of a source, rows of it and what they are: q, k, v, gate or up.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._strands: dict[int, list[RowOrigin]] = {}
        self._alive: list[Any] = []  # a tensor is known by its address
        self._done: set[Any] = set()
        self._fed, self._role = fed, role

    # -- what the trace says -----------------------------------------------------------------

    def read(self, tensor: Tensor | None, reader: Any) -> None:
        """A linear reads a tensor."""
        for strand in self._of(tensor):
            columns = strand.rows.reshape(-1, strand.rows.shape[-1])[0]
            if self._fed(strand.source, columns, reader):
                self._done.add(strand.source)

    def start(self, tensor: Tensor, source: Any, axis: int) -> None:
        """A linear returned a tensor, its rows along `axis`."""
        rows = torch.arange(tensor.shape[axis], dtype=torch.int32)
        rows = rows if axis == -1 else rows[:, None]
        self._keep(tensor, [RowOrigin(source, rows.expand(tensor.shape))])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Attention returned a tensor `(..., heads, tokens, columns of v)`."""
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            for strand in self._of(tensor):
                self._role(strand.source, strand.rows, name)
        made = []
        for strand in self._of(v):
            rows = strand.rows[..., :1, :]
            if v.dim() > 3 and v.shape[-3] != out.shape[-3]:
                rows = rows.repeat_interleave(out.shape[-3] // v.shape[-3], dim=-3)
            made.append(replace(strand, rows=rows.expand(out.shape)))
        self._keep(out, made)

    # -- operation by operation --------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute, and move the strands along."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        flat = [x for a in args for x in (a if isinstance(a, (list, tuple)) else [a])]
        if not any(id(x) in self._strands for x in flat):
            return result
        # An operation of a form that is not known here ends a strand.
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
            func = torch.reshape  # a strand may lie otherwise in memory
        if func is _aten._to_copy.default:
            self._keep(result, self._of(args[0]))
            return
        outs = result if isinstance(result, (list, tuple)) else [result]
        made: list[list[RowOrigin]] = [[] for _ in outs]
        for strand in self._of(args[0]):
            moved = func(strand.rows, *args[1:], **{k: v for k, v in kwargs.items() if k == "dim"})
            for k, rows in enumerate(moved if isinstance(moved, (list, tuple)) else [moved]):
                made[k].append(replace(strand, rows=rows))
        for out, strands in zip(outs, made, strict=True):
            self._keep(out, strands)

    def _cat(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        made = []
        sources = {(s.source, s.bent) for x in args[0] for s in self._of(x)}
        for source, bent in sources:
            parts = []
            for x in args[0]:
                own = [s.rows for s in self._of(x) if (s.source, s.bent) == (source, bent)]
                none = torch.full(x.shape, -1, dtype=torch.int32)
                parts.append(own[0] if own else none)
            made.append(RowOrigin(source, func(parts, *args[1:], **kwargs), bent))
        self._keep(result, made)

    def _sum(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        dims = args[1] if len(args) > 1 else None
        dims = (dims,) if isinstance(dims, int) else tuple(dims or range(args[0].dim()))
        made = []
        for strand in self._of(args[0]):
            if _same_along(strand.rows, dims):
                rows = strand.rows
                if func.overloadpacket is not _aten.cumsum:
                    for d in dims:
                        rows = rows.narrow(d, 0, 1)
                same = rows.numel() == result.numel()
                rows = rows.reshape(result.shape) if same else rows.expand(result.shape)
                made.append(replace(strand, rows=rows))
        self._keep(result, made)

    def _product(self, a: Tensor, b: Tensor, result: Tensor) -> None:
        made = []
        for strand in self._of(b):
            if _same_along(strand.rows, (-2,)):
                made.append(replace(strand, rows=strand.rows[..., :1, :].expand(result.shape)))
        for strand in self._of(a):
            if _same_along(strand.rows, (-1,)):
                made.append(replace(strand, rows=strand.rows[..., :1].expand(result.shape)))
        self._keep(result, made)

    def _pointwise(self, packet: Any, args: Any, result: Tensor) -> None:
        bends = any(name in str(packet) for name in _BENDS)
        given = [self._of(x) for x in args if isinstance(x, Tensor)]
        if "mul" in str(packet) and len(given) == 2:
            self._gate(*given)
        made = [
            replace(s, rows=s.rows.expand(result.shape), bent=s.bent or bends)
            for strands in given
            for s in strands
        ]
        self._keep(result, made)

    def _gate(self, one: Iterable[RowOrigin], other: Sequence[RowOrigin]) -> None:
        """Rows that pass an activation function and meet rows that did not are a gate's."""
        for a in one:
            for b in other:
                if a.source == b.source and a.bent != b.bent and not a.rows.equal(b.rows):
                    for s in (a, b):
                        self._role(s.source, s.rows, "gate" if s.bent else "up")

    # -- bookkeeping -------------------------------------------------------------------------

    def _of(self, tensor: Any) -> list[RowOrigin]:
        return [s for s in self._strands.get(id(tensor), ()) if s.source not in self._done]

    def _keep(self, tensor: Tensor, strands: Sequence[RowOrigin]) -> None:
        known: list[RowOrigin] = []
        for s in strands:
            same = [x for x in known if x.source == s.source and x.rows.equal(s.rows)]
            if not same:
                known.append(s)
            elif s.bent and not same[0].bent:
                known[known.index(same[0])] = s
        if known and len(known) <= _MOST:
            self._alive.append(tensor)
            self._strands[id(tensor)] = known
        else:
            self._strands.pop(id(tensor), None)


def _same_along(rows: Tensor, dims: Sequence[int]) -> bool:
    return all(
        rows.stride(d) == 0 or rows.shape[d] == 1 or bool((rows == rows.narrow(d, 0, 1)).all())
        for d in dims
    )


def _of_tokens(strands: Sequence[RowOrigin], result: Tensor) -> list[RowOrigin]:
    """Return strands of tokens that are picked or put elsewhere, where they are all the same."""
    made = []
    for strand in strands:
        if _same_along(strand.rows, range(strand.rows.dim() - 1)):
            rows = strand.rows.reshape(-1, strand.rows.shape[-1])[0]
            made.append(replace(strand, rows=rows.expand(result.shape)))
    return made
