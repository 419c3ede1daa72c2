"""What a model gives its blocks, and what they give one another.

Nothing that a model passes to a block is ever rebuilt by hand: the model itself runs, with its
blocks left out, and says what it passes. An argument that an earlier block returned is carried for
every candidate; one that the model computes from what blocks returned is computed by the model
again, from what was carried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuroal.layout import Block
from neuroal.walk.stubs import (
    PROBE_TOKENS,
    WRITTEN,
    BlockCall,
    BlockOutputs,
    OutputKey,
    OutputReference,
    Overlays,
    Reached,
    StubbedRun,
    boxes,
    left_out,
    run_whole,
)


class BlockArguments:
    """Knows how a model passes arguments to its blocks.

    Attributes:
        computed: For a block whose arguments the model computes from what blocks returned, what it
            computes them from.
        final: What the model reads behind its blocks, its head apart.
        again: Blocks that run more than once in a forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        open_block: Callable[[Block], AbstractContextManager[nn.Module]],
    ) -> None:
        """Run the model on a few tokens, and then several times with its blocks left out."""
        self._model = model
        # The base model is enough to see what passes between blocks: no logits are needed.
        self._base = getattr(model, "base_model", model)
        self._modules = [model.get_submodule(b.name) for b in blocks]
        device = next(p.device for p in model.parameters() if not p.is_meta)
        ids = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=device)
        self._results, self.again = run_whole(self._base, self._modules, blocks, ids, open_block)
        self.computed, self.final = self._dependencies(ids)

    # -- what is asked -----------------------------------------------------------------------

    def capture(self, ids: Tensor) -> tuple[BlockCall, ...]:
        """Return the model's own arguments to every block."""
        run = StubbedRun(self._placeholders(ids), lambda i: self._results[i].written)
        self._forward(ids, run)
        return tuple(run.calls)

    def arguments(
        self, index: int, call: BlockCall, ids: Tensor, carried: BlockOutputs, overlays: Overlays
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of one block for what earlier blocks handed on."""
        if index in self.computed:
            run = self._replay(ids, carried, overlays, index)
            self._forward(ids, run)
            call = run.calls[index]
        leaves = [
            carried[(x.block, x.leaf)] if isinstance(x, OutputReference) else x for x in call.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        return args, kwargs

    def returned(self, index: int, args: Any, kwargs: Any, result: Any) -> BlockOutputs:
        """Return what a block hands on: the tensors it returned, and what it wrote."""
        leaves = pytree.tree_leaves(result)
        made: BlockOutputs = {(index, k): x for k, x in enumerate(leaves) if isinstance(x, Tensor)}
        if self._results[index].written:
            made[(index, WRITTEN)] = {
                (where, key): box[key]
                for where, box in boxes(args, kwargs)
                for key in box
                if (where, key) in self._results[index].written
            }
        return made

    def last_use(self, calls: Sequence[BlockCall]) -> dict[OutputKey, int]:
        """Return the last block that reads each carried tensor; the number of blocks for none."""
        last: dict[OutputKey, int] = {}
        for i, call in enumerate(calls):
            keys = {(x.block, x.leaf) for x in call.leaves if isinstance(x, OutputReference)}
            last |= dict.fromkeys(self.computed.get(i, keys) | keys, i)
        return last | dict.fromkeys(self.final, len(calls))

    def logits(self, ids: Tensor, carried: BlockOutputs, overlays: Overlays) -> Tensor:
        """Return logits `(windows, tokens, vocabulary)` from what the blocks handed on."""
        run = self._replay(ids, carried, overlays, None)
        with left_out(self._modules, self._results, run), torch.no_grad():
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

    # -- runs with the blocks left out -------------------------------------------------------

    def _forward(self, ids: Tensor, run: StubbedRun) -> list[Tensor]:
        """Return what the base model returns; nothing where the run ends before."""
        made: Any = ()
        with left_out(self._modules, self._results, run), torch.no_grad(), suppress(Reached):
            made = self._base(input_ids=ids, use_cache=False)
        if not isinstance(made, (Tensor, Sequence)):
            made = list((made if isinstance(made, Mapping) else vars(made)).values())
        return [x for x in pytree.tree_leaves(made) if isinstance(x, Tensor)]

    def _placeholders(self, ids: Tensor) -> Callable[[int, Sequence[Any]], list[Any]]:
        """Return a stand-in for blocks: what they return has the right shapes and means nothing."""

        def outputs(index: int, leaves: Sequence[Any]) -> list[Any]:
            made = self._results[index]
            given = [x for x in leaves if isinstance(x, Tensor)]
            # Views are objects of their own: identity tells which block made a tensor.
            return [
                x
                if not isinstance(x, Tensor)
                else given[like].view_as(given[like])
                if like is not None and given[like].dtype == x.dtype
                else x.new_zeros(_scaled(x.shape, ids.shape))
                for x, like in zip(made.leaves, made.like, strict=True)
            ]

        return outputs

    def _replay(
        self, ids: Tensor, carried: BlockOutputs, overlays: Overlays, until: int | None
    ) -> StubbedRun:
        placeholders = self._placeholders(ids)

        def outputs(index: int, leaves: Sequence[Any]) -> list[Any]:
            made = placeholders(index, leaves)
            # Copies: the model may go on to write to what its block returned.
            return [
                carried[(index, k)].clone() if (index, k) in carried else x
                for k, x in enumerate(made)
            ]

        return StubbedRun(outputs, lambda i: carried.get((i, WRITTEN), {}), overlays, until)

    # -- what depends on what ----------------------------------------------------------------

    def _dependencies(self, ids: Tensor) -> tuple[dict[int, set[OutputKey]], set[OutputKey]]:
        """Find what is computed from what blocks return, by changing what they return.

        An argument that moves with it, but is not itself what was handed on, was computed.
        """
        count = len(self._modules)
        keys = [self._keys(i) for i in range(count)]
        everything = frozenset().union(*keys)
        plain, before = self._probe(ids, frozenset())
        moved, _ = self._probe(ids, everything)
        computed = {i for i in range(count) if _differ(plain[i], moved[i])}
        writers = {i for i, made in enumerate(self._results) if made.written}
        readers = {i for i in range(count) if writers and _holdsboxes(plain[i])}
        _, other = self._probe(ids, everything - keys[-1])
        one = _equal(before, other) and not self.again
        final = {
            key for key in keys[-1] if not _equal(before, self._probe(ids, frozenset({key}))[1])
        }
        needs: dict[int, set[OutputKey]] = {i: set() for i in computed | readers}
        for j in range(count - 1) if needs or not one else ():
            changed, behind = self._probe(ids, keys[j])
            for i in needs:
                if i > j and (_differ(plain[i], changed[i]) or _reads(plain[i], j)):
                    needs[i] |= keys[j]
                if i > j and j in writers:
                    needs[i].add((j, WRITTEN))
            if not one and not _equal(before, behind):
                final |= keys[j]
        return needs, final

    def _keys(self, index: int) -> frozenset[OutputKey]:
        leaves = self._results[index].leaves
        return frozenset((index, k) for k, x in enumerate(leaves) if isinstance(x, Tensor))

    def _probe(
        self, ids: Tensor, changed: frozenset[OutputKey]
    ) -> tuple[list[BlockCall], list[Tensor]]:
        """Run with blocks that return random numbers, others than usual for those `changed`."""

        def outputs(index: int, leaves: Sequence[Any]) -> list[Any]:
            return [
                _random(x, hash((index, k, (index, k) in changed)))
                if isinstance(x, Tensor) and x.is_floating_point()
                else x
                for k, x in enumerate(self._results[index].leaves)
            ]

        run = StubbedRun(outputs, lambda i: self._results[i].written)
        return run.calls, self._forward(ids, run)


def _random(like: Tensor, seed: int) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(x.equal(y) for x, y in zip(one, other, strict=True))


def _holdsboxes(call: BlockCall) -> bool:
    args, kwargs = pytree.tree_unflatten(list(call.leaves), call.spec)
    return any(True for _ in boxes(args, kwargs))


def _differ(one: BlockCall, other: BlockCall) -> bool:
    if len(one.leaves) != len(other.leaves):
        return True
    pairs = zip(one.leaves, other.leaves, strict=True)
    return any(
        isinstance(x, Tensor) and not (isinstance(y, Tensor) and x.equal(y)) for x, y in pairs
    )


def _reads(call: BlockCall, block: int) -> bool:
    return any(isinstance(x, OutputReference) and x.block == block for x in call.leaves)


def _scaled(shape: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Return the shape that a probe's tensor would have for windows `ids (windows, tokens)`."""
    windows, tokens = ids
    made = [tokens if n == PROBE_TOKENS else n for n in shape]
    if made and shape[0] == 1:
        made[0] = windows
    return made
