"""One run of the model on a few tokens: which blocks run, and which matrices multiply in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from neuroal.errors import NeuroalError
from neuroal.layout.flow import Flow
from neuroal.layout.matrices import Products
from neuroal.layout.parts import Place

TRACE_TOKENS = 8
_READERS = 3  # a router may read the rows before the linears that count


@dataclass(eq=False)
class Event:
    """A matrix that multiplied an input while a block ran.

    Attributes:
        block: The block's module name.
        place: Where the matrix lies.
        shape: `(out, in)`.
        input: `(..., in)`; holding it keeps its address unique.
    """

    block: str
    place: Place
    shape: tuple[int, int]
    input: Tensor

    def same_input(self, other: Event) -> bool:
        """Return whether two matrices multiplied one and the same input."""
        a, b = self.input, other.input
        if a is b:
            return True
        layout = a.shape == b.shape and a.stride() == b.stride()
        start = a.storage_offset() == b.storage_offset()
        return layout and start and a.untyped_storage()._cdata == b.untyped_storage()._cdata


@dataclass
class Trace:
    """What ran.

    Attributes:
        runs: Names of blocks in order, again if they ran again.
        events: Their products, in order.
        reads: For a product, the products that read its output, and for every column that they
            read the row that it came from, int32 `(in,)`, -1 for none.
        roles: For a product, what rows of its output are (q, k, v, gate, up), int32.
    """

    runs: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    reads: dict[Event, dict[Event, list[Tensor]]] = field(default_factory=dict)
    roles: dict[Event, dict[str, Tensor]] = field(default_factory=dict)

    def read(self, source: Event, columns: Tensor, reader: Event) -> bool:
        """Note that a product reads another's rows; True when enough of them have."""
        self.reads.setdefault(source, {}).setdefault(reader, []).append(columns)
        return len(self.reads[source]) >= _READERS

    def role(self, source: Event, rows: Tensor, name: str) -> None:
        """Note what rows are."""
        roles = self.roles.setdefault(source, {})
        rows = torch.unique(rows[rows >= 0])
        roles[name] = torch.unique(torch.cat([roles[name], rows])) if name in roles else rows


class _Meta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers questions about values, which meta tensors do not have.

    Every number is one, and every entry of a mask is true.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return _everywhere(args[0])
        if func is torch.ops.aten._to_copy.default and args[0].is_meta:
            device = (kwargs or {}).get("device")
            if device is not None and torch.device(device).type != "meta":  # read by the model
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is torch.ops.aten.split_with_sizes.default and args[0].is_meta:
            args = (args[0], _sizes(args[0], *args[1:]), *args[2:])
        if func in _INDEXED and args[0].is_meta:
            indices = [y for x in args[1] for y in _indices(x)]
            args = (args[0], indices, *args[2:])
        given = (*args, *(kwargs or {}).values())
        flat = [x for a in given for x in (a if isinstance(a, (list, tuple)) else (a,))]
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if any(x.is_meta for x in tensors) and any(x.dim() and not x.is_meta for x in tensors):
            # A tensor that the model moved to another device meets one that it did not move.
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        return func(*args, **(kwargs or {}))


_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


def _sizes(tensor: Tensor, sizes: list[int], dim: int = 0) -> list[int]:
    """Return sizes that add up: where unknown values decide them, all is in the first."""
    total = tensor.shape[dim]
    return sizes if sum(sizes) == total else [total, *([0] * (len(sizes) - 1))]


def _everywhere(mask: Tensor) -> Tensor:
    """Return where a mask is true: everywhere.

    A mask of one dimension, which models loop over, is true in its first entry: one expert stands
    for all.
    """
    if mask.dim() == 1:
        return torch.zeros((1, 1), dtype=torch.long)
    return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.long)


def _indices(index: Tensor | None) -> list[Tensor | None]:
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Make `torch.autocast` do nothing on meta tensors, a device that it does not know.

    Models of transformers 4 switch it off around their position embeddings.
    """
    original = torch.autocast
    if device.type == "meta":
        torch.autocast = lambda *args, **kwargs: nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


class _Watch(Products):
    """Reports products to a trace, and has the flow follow their outputs."""

    def __init__(self, parameters: Mapping[str, Tensor], trace: Trace, inside: list[str]) -> None:
        super().__init__(parameters, self._note)
        self.flow = Flow(trace.read, trace.role)
        self._trace, self._inside = trace, inside
        self._now: list[Event] = []

    def _note(self, place: Place, shape: tuple[int, int], x: Tensor) -> None:
        if self._inside:
            event = Event(self._inside[-1], place, shape, x)
            self._trace.events.append(event)
            self._now.append(event)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._now = []
        result = super().__torch_function__(func, types, args, kwargs)
        if self._now:  # the slices of a stack are alike: the first stands for all
            given = next((e.input for e in self._now if e.input.numel()), None)
            self.flow.read(given, self._now[0])
            self.flow.start(result, self._now[0], -2 if self.left else -1)
        elif getattr(func, "__name__", "") == "scaled_dot_product_attention" and len(args) >= 3:
            self.flow.attention(args[0], args[1], args[2], result)
        return result


def trace(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Trace:
    """Run a model, on any device, meta included, once on a few tokens.

    `blocks` are what may be its blocks, by module name.

    Raises:
        NeuroalError: It does not run.
    """
    result = Trace()
    inside: list[str] = []

    def enter(name: str, module: nn.Module, args: Any) -> None:
        inside.append(name)
        result.runs.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    handles = [b.register_forward_pre_hook(partial(enter, n)) for n, b in blocks.items()]
    handles += [b.register_forward_hook(leave) for b in blocks.values()]
    device = next(model.parameters()).device
    watch = _Watch(dict(model.named_parameters()), result, inside)
    try:
        with torch.no_grad(), _without_autocast(device), _Meta(), watch.flow, watch:  # type: ignore[no-untyped-call]
            ids = torch.zeros((1, TRACE_TOKENS), dtype=torch.long, device=device)
            model(input_ids=ids, use_cache=False)
    except NeuroalError:
        raise
    except Exception as error:
        raise NeuroalError(
            f"{type(model).__name__} does not run on {TRACE_TOKENS} tokens as a causal language "
            f"model: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return result
