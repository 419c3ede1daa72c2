"""A model that runs with a stub in place of each of its blocks.

A stub records the arguments that the model passes to its block and returns what `StubbedRun` says,
so that the model's own code shows what passes between its blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from neuroal.errors import NeuroalError
from neuroal.layout import Block

PROBE_TOKENS = 11  # a length that is hardly the size of anything else in a model

OutputKey = tuple[int, int]
"""Block, and which of the tensors that it returned; -1 for what it wrote into its arguments."""

BlockOutputs = dict[OutputKey, Any]
"""The outputs of blocks so far."""

Overlays = Mapping[int, Mapping[str, Tensor]]
"""By block that runs again: parameters in place of its own, by name within the block."""

OpenBlock = Callable[[Block], AbstractContextManager[nn.Module]]
"""Holds a block's module with its weights in memory."""

WRITTEN = -1


@dataclass(frozen=True)
class OutputReference:
    """In a block's arguments, the place of the `leaf`-th tensor that block `block` returned."""

    block: int
    leaf: int


class BlockCall(NamedTuple):
    """A block's arguments for one batch; `OutputReference` for what earlier blocks returned."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec


@dataclass(frozen=True)
class BlockResult:
    """The result of a block when the whole model ran.

    Attributes:
        leaves: Leaves of the tree that it returned.
        spec: The form of that tree.
        written: What it wrote into mappings among its arguments, by argument and key.
        like: For every leaf, which tensor argument has its shape; None where none has.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    written: Mapping[Any, Any]
    like: tuple[int | None, ...]


class Reached(Exception):
    """Ends a stubbed run at the block whose arguments are wanted."""


@dataclass
class StubbedRun:
    """One run of the model with stubs in place of its blocks.

    Attributes:
        outputs: What a stub returns, from its block's index and the leaves of its arguments.
        written: What a stub writes into mappings among its arguments, from its block's index.
        overlays: For blocks that run again, with these parameters; only their first run is a stub.
        until: The block before which the run ends; None runs to the end.
        calls: The arguments of the blocks, in order; filled by the run.
    """

    outputs: Callable[[int, Sequence[Any]], list[Any]]
    written: Callable[[int], Mapping[Any, Any]]
    overlays: Overlays = field(default_factory=dict)
    until: int | None = None
    calls: list[BlockCall] = field(default_factory=list)


@contextmanager
def stubbed(
    modules: Sequence[nn.Module], results: Sequence[BlockResult], run: StubbedRun
) -> Iterator[None]:
    """Replace every block's forward, the first time it runs, by a stub."""
    references: dict[int, OutputReference] = {}  # by the address of a tensor that a stub returned
    alive: list[Any] = []  # so that no address is used twice
    originals = [module.forward for module in modules]
    owned = ["forward" in vars(module) for module in modules]

    def stub(index: int) -> Callable[..., Any]:
        visits = 0
        inside = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal visits, inside
            visits += 1
            if inside or (visits > 1 and index not in run.overlays):
                return originals[index](*args, **kwargs)
            if visits > 1:
                inside = True
                overlay = dict(run.overlays[index])
                result = functional_call(modules[index], overlay, args, kwargs)
                inside = False
                return result
            leaves, spec = pytree.tree_flatten((args, kwargs))
            known = [references.get(id(x), x) if isinstance(x, Tensor) else x for x in leaves]
            run.calls.append(BlockCall(tuple(known), spec))
            if index == run.until:
                raise Reached
            outputs = run.outputs(index, leaves)
            for (argument, key), value in run.written(index).items():
                dict(mutable_mappings(args, kwargs))[argument][key] = value
            alive.append((leaves, outputs))
            for k, x in enumerate(outputs):
                if isinstance(x, Tensor):
                    references[id(x)] = OutputReference(index, k)
            return pytree.tree_unflatten(outputs, results[index].spec)

        return forward

    try:
        for i, module in enumerate(modules):
            module.forward = stub(i)
        yield
    finally:
        for module, original, own in zip(modules, originals, owned, strict=True):
            if own:
                module.forward = original
            else:
                del module.forward


def record_results(
    base: nn.Module,
    modules: Sequence[nn.Module],
    blocks: Sequence[Block],
    ids: Tensor,
    open_block: OpenBlock,
) -> tuple[list[BlockResult], set[int]]:
    """Run the model up to its head: return every block's result, and which blocks run again.

    Raises:
        NeuroalError: A block cannot be replaced by a stub.
    """
    recorder = _Recorder(blocks, open_block)
    handles = []
    for i, m in enumerate(modules):
        before, after = partial(recorder.before, i), partial(recorder.after, i)
        handles.append(m.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(m.register_forward_hook(after, with_kwargs=True))
    try:
        with recorder.opened, torch.no_grad():
            base(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(recorder.results) != len(modules):
        raise NeuroalError(f"block {blocks[len(recorder.results)].name} does not run")
    return recorder.results, recorder.again


class _Recorder:
    """Records the results of blocks, and which run again, while the whole model runs."""

    def __init__(self, blocks: Sequence[Block], open_block: OpenBlock) -> None:
        self.results: list[BlockResult] = []
        self.again: set[int] = set()
        self.opened = ExitStack()  # holds the block that runs
        self._blocks, self._open_block = blocks, open_block
        self._visits: Counter[int] = Counter()
        self._before: list[tuple[list[Tensor], list[int], dict[Any, Any]]] = []

    def before(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Hold a block, and note its arguments as they are before it runs."""
        self._visits[index] += 1
        self.opened.enter_context(self._open_block(self._blocks[index]))
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        versions = [x._version for x in tensors]
        self._before.append((tensors, versions, mapping_items(args, kwargs)))

    def after(self, index: int, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Let a block go, and note what it returned and wrote."""
        tensors, versions, items = self._before.pop()
        name = self._blocks[index].name
        if versions != [x._version for x in tensors]:
            raise NeuroalError(f"block {name} writes to its arguments: it cannot be run twice")
        self.opened.close()
        if self._visits[index] > 1:
            self.again.add(index)
            return
        if index != len(self.results):
            raise NeuroalError(f"block {name} runs before {self._blocks[len(self.results)].name}")
        leaves, spec = pytree.tree_flatten(result)
        written = {
            key: value
            for key, value in mapping_items(args, kwargs).items()
            if items.get(key) is not value
        }
        shapes = [x.shape for x in tensors]
        like = tuple(
            shapes.index(x.shape) if isinstance(x, Tensor) and x.shape in shapes else None
            for x in leaves
        )
        self.results.append(BlockResult(tuple(leaves), spec, written, like))


def mutable_mappings(
    args: Any, kwargs: Any
) -> Iterator[tuple[int | str, MutableMapping[Any, Any]]]:
    """Yield the mappings among a block's arguments, into which it may write."""
    for argument, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, MutableMapping):
            yield argument, value


def mapping_items(args: Any, kwargs: Any) -> dict[tuple[int | str, Any], Any]:
    """Return the items of those mappings by argument and key."""
    return {
        (argument, key): value
        for argument, mapping in mutable_mappings(args, kwargs)
        for key, value in mapping.items()
    }
