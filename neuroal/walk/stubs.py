"""A model that runs with its blocks left out: something stands in for each.

What stands in for a block records the arguments that the model gives it and returns what it is
told to, so that the model's own code says what passes between its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
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
"""What blocks handed on so far."""

Overlays = Mapping[int, Mapping[str, Tensor]]
"""Parameters in place of a block's own, by name within the block, for blocks that run again."""

WRITTEN = -1


@dataclass(frozen=True)
class OutputReference:
    """Stands, in a block's arguments, for the `leaf`-th tensor that block `block` returned."""

    block: int
    leaf: int


class BlockCall(NamedTuple):
    """A block's arguments for one batch; `OutputReference` for what earlier blocks returned."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec


@dataclass(frozen=True)
class BlockResult:
    """What a block returned when the whole model ran."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    written: Mapping[Any, Any]
    like: tuple[int | None, ...]  # which tensor argument has the shape of each tensor returned


class Reached(Exception):
    """Ends a run of the model at the block whose arguments are wanted."""


@dataclass
class StubbedRun:
    """One run of the model with its blocks left out.

    Attributes:
        outputs: What a block returns, given its index and its arguments' leaves.
        overlays: For blocks that run again: they are not left out then.
        until: The block before which the run ends; None runs to the end.
        calls: The arguments of the blocks, in order.
    """

    outputs: Callable[[int, Sequence[Any]], list[Any]]
    written: Callable[[int], Mapping[Any, Any]]
    overlays: Overlays = field(default_factory=dict)
    until: int | None = None
    calls: list[BlockCall] = field(default_factory=list)


@contextmanager
def left_out(
    modules: Sequence[nn.Module], results: Sequence[BlockResult], run: StubbedRun
) -> Iterator[None]:
    """Replace every block's forward, the first time it runs, by what `run` says."""
    made: dict[int, OutputReference] = {}
    alive: list[Any] = []  # identity is told by address
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
            known = [made.get(id(x), x) if isinstance(x, Tensor) else x for x in leaves]
            run.calls.append(BlockCall(tuple(known), spec))
            if index == run.until:
                raise Reached
            outputs = run.outputs(index, leaves)
            for (where, key), value in run.written(index).items():
                dict(boxes(args, kwargs))[where][key] = value
            alive.append((leaves, outputs))
            for k, x in enumerate(outputs):
                if isinstance(x, Tensor):
                    made[id(x)] = OutputReference(index, k)
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


def run_whole(
    base: nn.Module,
    modules: Sequence[nn.Module],
    blocks: Sequence[Block],
    ids: Tensor,
    open_block: Callable[[Block], AbstractContextManager[nn.Module]],
) -> tuple[list[BlockResult], set[int]]:
    """Run the model up to its head: return what blocks' results look like, and which run again.

    Raises:
        NeuroalError: A block cannot be left out.
    """
    again: set[int] = set()
    results: list[BlockResult] = []
    visits = [0] * len(modules)
    held = ExitStack()
    given: list[Any] = []

    def before(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            visits[index] += 1
            held.enter_context(open_block(blocks[index]))
            given.append(_state(args, kwargs))

        return hook

    def after(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            tensors, versions, items = given.pop()
            if versions != [x._version for x in tensors]:
                raise NeuroalError(
                    f"block {blocks[index].name} writes to its arguments: it cannot be run twice"
                )
            held.close()
            if visits[index] > 1:
                again.add(index)
                return
            if index != len(results):
                raise NeuroalError(
                    f"block {blocks[index].name} runs before {blocks[len(results)].name}"
                )
            leaves, spec = pytree.tree_flatten(result)
            written = {
                (where, key): value
                for where, box in boxes(args, kwargs)
                for key, value in box.items()
                if items.get((where, key)) is not value
            }
            shapes = [x.shape for x in tensors]
            like = tuple(
                shapes.index(x.shape) if isinstance(x, Tensor) and x.shape in shapes else None
                for x in leaves
            )
            results.append(BlockResult(tuple(leaves), spec, written, like))

        return hook

    handles = [
        m.register_forward_pre_hook(before(i), with_kwargs=True) for i, m in enumerate(modules)
    ]
    handles += [m.register_forward_hook(after(i), with_kwargs=True) for i, m in enumerate(modules)]
    try:
        with held, torch.no_grad():
            base(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(results) != len(modules):
        raise NeuroalError(f"block {blocks[len(results)].name} does not run")
    return results, again


def _state(args: Any, kwargs: Any) -> tuple[list[Tensor], list[int], dict[Any, Any]]:
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    items = {
        (where, key): value for where, box in boxes(args, kwargs) for key, value in box.items()
    }
    return tensors, [x._version for x in tensors], items


def boxes(args: Any, kwargs: Any) -> Iterator[tuple[int | str, MutableMapping[Any, Any]]]:
    """Yield the mappings among a block's arguments, which it may write into."""
    for where, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, MutableMapping):
            yield where, value
