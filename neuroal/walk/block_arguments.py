"""What a model passes to its blocks, and from block to block.

No argument of a block is ever rebuilt by hand: the model itself runs, with stubs in place of its
blocks, and shows what it passes. An argument that an earlier block returned is taken from the
candidate's own outputs; one that the model computes from block outputs (a scaled hidden state, for
example) the model computes again, from the candidate's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
    OpenBlock,
    OutputKey,
    OutputReference,
    Overlays,
    Reached,
    StubbedRun,
    mapping_items,
    mutable_mappings,
    record_results,
    stubbed,
)


class BlockArguments:
    """Knows how a model passes arguments to its blocks.

    Attributes:
        computed: For a block with arguments that the model computes from block outputs, the
            outputs that it computes them from.
        final: The outputs that the model reads after its blocks, to give its head an input.
        again: Blocks that run more than once in a forward pass.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], open_block: OpenBlock) -> None:
        """Run the model on a few tokens, and then several times with stubs."""
        self._model = model
        # The base model is enough to see what passes between blocks: no logits are needed.
        self._base = getattr(model, "base_model", model)
        self._modules = [model.get_submodule(b.name) for b in blocks]
        device = next(p.device for p in model.parameters() if not p.is_meta)
        ids = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=device)
        results = record_results(self._base, self._modules, blocks, ids, open_block)
        self._results, self.again = results
        self.computed, self.final = self._dependencies(ids)

    # -- what the walker asks for ------------------------------------------------------------

    def capture(self, ids: Tensor) -> tuple[BlockCall, ...]:
        """Return the model's own arguments to every block."""
        run = StubbedRun(self._placeholders(ids), lambda i: self._results[i].written)
        self._forward(ids, run)
        return tuple(run.calls)

    def arguments(
        self, index: int, call: BlockCall, ids: Tensor, outputs: BlockOutputs, overlays: Overlays
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of one block, from the outputs of earlier blocks."""
        if index in self.computed:
            run = self._replay(ids, outputs, overlays, index)
            self._forward(ids, run)
            call = run.calls[index]
        leaves = [
            outputs[(x.block, x.leaf)] if isinstance(x, OutputReference) else x for x in call.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        return args, kwargs

    def returned(self, index: int, args: Any, kwargs: Any, result: Any) -> BlockOutputs:
        """Return a block's outputs: the tensors that it returned, and what it wrote."""
        leaves = pytree.tree_leaves(result)
        outputs: BlockOutputs = {
            (index, k): x for k, x in enumerate(leaves) if isinstance(x, Tensor)
        }
        if written := self._results[index].written:
            items = mapping_items(args, kwargs)
            outputs[(index, WRITTEN)] = {key: x for key, x in items.items() if key in written}
        return outputs

    def last_use(self, calls: Sequence[BlockCall]) -> dict[OutputKey, int]:
        """Return the last block that reads each output; the number of blocks for the head."""
        last: dict[OutputKey, int] = {}
        for i, call in enumerate(calls):
            keys = {(x.block, x.leaf) for x in call.leaves if isinstance(x, OutputReference)}
            last |= dict.fromkeys(self.computed.get(i, keys) | keys, i)
        return last | dict.fromkeys(self.final, len(calls))

    def logits(self, ids: Tensor, outputs: BlockOutputs, overlays: Overlays) -> Tensor:
        """Return logits `(windows, tokens, vocabulary)` from the outputs of all blocks."""
        run = self._replay(ids, outputs, overlays, None)
        with stubbed(self._modules, self._results, run), torch.no_grad():
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

    # -- runs with stubs ---------------------------------------------------------------------

    def _forward(self, ids: Tensor, run: StubbedRun) -> list[Tensor]:
        """Return what the base model returns; nothing where the run ends before."""
        returned: Any = ()
        with stubbed(self._modules, self._results, run), torch.no_grad(), suppress(Reached):
            returned = self._base(input_ids=ids, use_cache=False)
        if not isinstance(returned, (Tensor, Sequence)):
            returned = list(
                (returned if isinstance(returned, Mapping) else vars(returned)).values()
            )
        return [x for x in pytree.tree_leaves(returned) if isinstance(x, Tensor)]

    def _placeholders(self, ids: Tensor) -> Callable[[int, Sequence[Any]], list[Any]]:
        """Return what stubs return where only shapes matter: arguments of that shape, or zeros."""

        def stub_outputs(index: int, leaves: Sequence[Any]) -> list[Any]:
            result = self._results[index]
            arguments = [x for x in leaves if isinstance(x, Tensor)]
            # A view is an object of its own: its identity says which block returned it.
            return [
                x
                if not isinstance(x, Tensor)
                else arguments[like].view_as(arguments[like])
                if like is not None and arguments[like].dtype == x.dtype
                else x.new_zeros(_scaled(x.shape, ids.shape))
                for x, like in zip(result.leaves, result.like, strict=True)
            ]

        return stub_outputs

    def _replay(
        self, ids: Tensor, outputs: BlockOutputs, overlays: Overlays, until: int | None
    ) -> StubbedRun:
        """Return a run in which stubs return these outputs of their blocks."""
        placeholders = self._placeholders(ids)

        def stub_outputs(index: int, leaves: Sequence[Any]) -> list[Any]:
            # Copies: the model may write to what its block returned.
            return [
                outputs[(index, k)].clone() if (index, k) in outputs else x
                for k, x in enumerate(placeholders(index, leaves))
            ]

        return StubbedRun(stub_outputs, lambda i: outputs.get((i, WRITTEN), {}), overlays, until)

    # -- what depends on what ----------------------------------------------------------------

    def _dependencies(self, ids: Tensor) -> tuple[dict[int, set[OutputKey]], set[OutputKey]]:
        """Return which block outputs the model computes with: for its blocks, and after them.

        The stubs of every run return random numbers. Where other numbers of one block change an
        argument of a later block that is not itself a block output, the model computes that
        argument from them; where they change what the model returns, it reads them after its
        blocks.

        Returns:
            For every block with computed arguments, or with a mapping that earlier blocks write
            into, the outputs that it depends on; and the outputs that the model's result does.
        """
        count = len(self._modules)
        keys = [
            frozenset((i, k) for k, x in enumerate(result.leaves) if isinstance(x, Tensor))
            for i, result in enumerate(self._results)
        ]
        every_key = frozenset().union(*keys)
        calls, result = self._probe(ids, frozenset())
        calls_changed, _ = self._probe(ids, every_key)
        computed = {i for i in range(count) if _differ(calls[i], calls_changed[i])}
        writers = {i for i, x in enumerate(self._results) if x.written}
        readers = {i for i in range(count) if writers and _has_mappings(calls[i])}
        _, result_changed = self._probe(ids, every_key - keys[-1])
        reads_last_alone = _equal(result, result_changed) and not self.again
        final = {
            key for key in keys[-1] if not _equal(result, self._probe(ids, frozenset({key}))[1])
        }
        needs: dict[int, set[OutputKey]] = {i: set() for i in computed | readers}
        for j in range(count - 1) if needs or not reads_last_alone else ():
            calls_changed, result_changed = self._probe(ids, keys[j])
            for i in needs:
                if i > j and (_differ(calls[i], calls_changed[i]) or _reads(calls[i], j)):
                    needs[i] |= keys[j]
                if i > j and j in writers:
                    needs[i].add((j, WRITTEN))
            if not reads_last_alone and not _equal(result, result_changed):
                final |= keys[j]
        return needs, final

    def _probe(
        self, ids: Tensor, changed: frozenset[OutputKey]
    ) -> tuple[list[BlockCall], list[Tensor]]:
        """Run with stubs that return random numbers, other ones for the outputs in `changed`."""

        def stub_outputs(index: int, leaves: Sequence[Any]) -> list[Any]:
            return [
                _random(x, hash((index, k, (index, k) in changed)))
                if isinstance(x, Tensor) and x.is_floating_point()
                else x
                for k, x in enumerate(self._results[index].leaves)
            ]

        run = StubbedRun(stub_outputs, lambda i: self._results[i].written)
        return run.calls, self._forward(ids, run)


def _random(like: Tensor, seed: int) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(x.equal(y) for x, y in zip(one, other, strict=True))


def _has_mappings(call: BlockCall) -> bool:
    args, kwargs = pytree.tree_unflatten(list(call.leaves), call.spec)
    return any(True for _ in mutable_mappings(args, kwargs))


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
    scaled = [tokens if n == PROBE_TOKENS else n for n in shape]
    if scaled and shape[0] == 1:
        scaled[0] = windows
    return scaled
