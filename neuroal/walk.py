"""One pass over the blocks for one or many allocations; the only place that runs the model.

Calibration windows go through the model's own embeddings and reach `Inputs` together with every
argument that the model gives its blocks. A walk then sends hidden states through block after
block: dense, collecting statistics, and with pruned weights laid over the dense ones. The model's
own weights change in `commit` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from neuroal.errors import NeuroalError
from neuroal.hookspecs import Accumulator
from neuroal.layout import TRACE_TOKENS, Block, Layout
from neuroal.statistics import Collector, Statistics

CPU_TOKENS, DEVICE_TOKENS = 2048, 16384  # tokens of one batch

LinearStatistics = dict[str, Statistics]
OpenBlock = Callable[[Block], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class _Output:
    """Stands, in a block's arguments, for the `leaf`-th tensor that block `block` returned."""

    block: int
    leaf: int


@dataclass(frozen=True)
class _Call:
    """The arguments of one block for one batch; `_Output` where they come from earlier blocks."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec


@dataclass(frozen=True)
class Batch:
    """Some windows, and the arguments that the model passes to every block for them."""

    ids: Tensor
    calls: tuple[_Call, ...]


Carried = dict[tuple[int, int], Tensor]
"""What blocks handed on so far: (block, leaf) to tensor."""


@dataclass
class Prefix:
    """The state of one candidate between two blocks: what its blocks handed on, per batch."""

    carried: list[Carried]

    @classmethod
    def start(cls, inputs: Inputs) -> Prefix:
        return cls([{} for _ in inputs.batches])


@dataclass(frozen=True)
class Inputs:
    """Calibration windows, ready to walk.

    Attributes:
        batches: In window order.
        windows: Number of windows.
        last_use: The last block that reads each carried tensor.
    """

    batches: tuple[Batch, ...]
    windows: int
    last_use: Mapping[tuple[int, int], int]


@dataclass
class Pass:
    """What one pass of one prefix through one block gave.

    Attributes:
        statistics: By linear name; linears that share an input share the object.
        prefix: The state behind the block; None if its output was not asked for.
        inputs: Group inputs per batch, kept for accumulators that compare.
    """

    statistics: LinearStatistics
    prefix: Prefix | None
    inputs: list[dict[int, Tensor]] = field(default_factory=list)


class _Stop(Exception):
    """Ends a block's forward pass once everything that is read has been seen."""


def batch_size(device: torch.device, length: int) -> int:
    """Return how many windows of so many tokens pass a block together."""
    return max(1, (CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS) // length)


class Walker:
    """Runs a model's blocks one by one, exactly as the model itself would.

    Attributes:
        model: The causal language model, in evaluation mode.
        layout: Its layout.
        block_runs: Blocks times windows run so far.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, open_block: OpenBlock | None = None
    ) -> None:
        self.model = model
        self.layout = layout
        self.block_runs = 0
        self._open = open_block or (lambda b: nullcontext(model.get_submodule(b.name)))
        self._blocks = [model.get_submodule(b.name) for b in layout.blocks]
        self._observe: Callable[[int, Tensor], None] | None = None
        ids = torch.zeros((1, TRACE_TOKENS), dtype=torch.long, device=self.device)
        self._results = self._trace(ids)
        self._refuse_changed_hand_over(ids)

    @property
    def device(self) -> torch.device:
        """Return the device of the model's first parameter."""
        return next(self.model.parameters()).device

    # -- inputs ------------------------------------------------------------------------------

    def inputs(self, ids: Tensor, batch: int | None = None) -> Inputs:
        """Return windows ready to walk.

        Args:
            ids: int64 `(windows, length)`.
            batch: Windows per batch; chosen by the number of tokens when None.
        """
        batch = batch or batch_size(self.device, ids.shape[1])
        batches = [self._batch(part) for part in torch.split(ids, batch)]
        last_use: dict[tuple[int, int], int] = {}
        for i, call in enumerate(batches[0].calls):
            for leaf in call.leaves:
                if isinstance(leaf, _Output):
                    last_use[(leaf.block, leaf.leaf)] = i
        return Inputs(tuple(batches), len(ids), last_use)

    def logits(self, batch: Batch, carried: Carried) -> Tensor:
        """Return logits `(windows, tokens, vocabulary)` from the last block's output."""
        last = len(self._blocks) - 1
        with self._stubs([], carried[(last, 0)]), torch.no_grad():
            logits: Tensor = self.model(input_ids=batch.ids, use_cache=False).logits
        return logits

    def _batch(self, ids: Tensor) -> Batch:
        ids = ids.to(self.device)
        return Batch(ids, self._capture(ids))

    def _capture(self, ids: Tensor, shift: bool = False) -> tuple[_Call, ...]:
        """Capture the model's own arguments to every block by running it with blocks left out."""
        calls: list[_Call] = []
        with self._stubs(calls, None, shift), torch.no_grad():
            # The base model is enough: no logits are needed to see the blocks' arguments.
            getattr(self.model, "base_model", self.model)(input_ids=ids, use_cache=False)
        return tuple(calls)

    def _refuse_changed_hand_over(self, ids: Tensor) -> None:
        """Refuse a model that computes what it gives a block from what earlier blocks returned.

        Such an argument could not be carried per candidate. It is found by shifting what the blocks
        hand on: an argument that moves with it, but is not itself what was handed on, was computed.
        """
        plain, shifted = self._capture(ids), self._capture(ids, shift=True)
        for i, block in enumerate(self.layout.blocks):
            pairs = zip(plain[i].leaves, shifted[i].leaves, strict=True)
            computed = any(isinstance(x, Tensor) and not x.equal(y) for x, y in pairs)
            handed = any(isinstance(x, _Output) and x.block == i - 1 for x in plain[i].leaves)
            if computed or not (handed or i == 0):
                raise NeuroalError(
                    f"block {block.name} does not take what the blocks before it return: the model "
                    "changes hidden states between its blocks"
                )

    @contextmanager
    def _stubs(
        self, calls: list[_Call], final: Tensor | None, shift: bool = False
    ) -> Iterator[None]:
        """Replace every block's forward by one that records its arguments and hands on its input.

        The last one returns `final` instead, if that is given. With `shift`, what they hand on is
        off by one.
        """
        made: dict[int, _Output] = {}
        alive: list[Any] = []

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                leaves, spec = pytree.tree_flatten((args, kwargs))
                hidden = next(x for x in leaves if isinstance(x, Tensor))
                calls.append(_Call(tuple(made.get(id(x), x) for x in leaves), spec))
                results, shape = self._results[index]
                last = final is not None and index == len(self._blocks) - 1
                # Views are objects of their own: identity tells which block made a tensor.
                outputs = [
                    (x + 1 if shift and x.is_floating_point() else x.view(x.shape))
                    if isinstance(x, Tensor)
                    else x
                    for x in (final if last else hidden, *results[1:])
                ]
                alive.append((leaves, outputs))
                for k, x in enumerate(outputs):
                    if isinstance(x, Tensor):
                        made[id(x)] = _Output(index, k)
                return pytree.tree_unflatten(outputs, shape)

            return forward

        originals = [block.forward for block in self._blocks]
        owned = ["forward" in vars(block) for block in self._blocks]
        try:
            for i, block in enumerate(self._blocks):
                block.forward = stub(i)
            yield
        finally:
            for block, original, own in zip(self._blocks, originals, owned, strict=True):
                if own:
                    block.forward = original
                else:
                    del block.forward

    def _trace(self, ids: Tensor) -> list[tuple[list[Any], pytree.TreeSpec]]:
        """Run the model on a few tokens and return what each block's result looks like."""
        results: list[tuple[list[Any], pytree.TreeSpec]] = []
        given: list[tuple[list[Any], list[int], pytree.TreeSpec]] = []

        def state(args: Any, kwargs: Any) -> tuple[list[Any], list[int], pytree.TreeSpec]:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            return leaves, [x._version for x in leaves if isinstance(x, Tensor)], spec

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            given.append(state(args, kwargs))

        def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            (leaves, *rest), (same, *now) = given[-1], state(args, kwargs)
            if rest != now or any(x is not y for x, y in zip(leaves, same, strict=True)):
                name = self.layout.blocks[len(results)].name
                raise NeuroalError(f"block {name} writes to its arguments: it cannot be run twice")
            leaves, spec = pytree.tree_flatten(result)
            results.append((leaves, spec))

        handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in self._blocks]
        handles += [b.register_forward_hook(after, with_kwargs=True) for b in self._blocks]
        try:
            with torch.no_grad():
                self.model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(results) != len(self._blocks):
            raise NeuroalError(
                f"{len(results)} block calls in one forward pass of {len(self._blocks)} blocks"
            )
        return results

    # -- one block ---------------------------------------------------------------------------

    @contextmanager
    def block(self, block: Block) -> Iterator[nn.Module]:
        """Hold one block, its linears observed."""
        with self._open(block) as module:
            handles = []
            first: dict[int, str] = {}
            for linear in block.linears:
                first.setdefault(linear.group, linear.name)

            def observer(group: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
                def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                    if self._observe is not None:
                        self._observe(group, args[0])

                return hook

            try:
                for group, name in first.items():
                    linear_module = module.get_submodule(name.removeprefix(block.name + "."))
                    handles.append(linear_module.register_forward_pre_hook(observer(group)))
                yield module
            finally:
                for handle in handles:
                    handle.remove()

    def run(
        self,
        block: Block,
        module: nn.Module,
        inputs: Inputs,
        prefix: Prefix,
        accumulators: Sequence[Accumulator] = (),
        *,
        weights: Mapping[str, Tensor] | None = None,
        output: bool = True,
        dense: Pass | None = None,
        keep_inputs: bool = False,
    ) -> Pass:
        """Run one prefix through one block.

        Args:
            block: The block.
            module: Its module, from `Walker.block`.
            inputs: The windows.
            prefix: What the blocks before handed on; not changed.
            accumulators: Statistics to collect.
            weights: Weights by linear name to lay over the module's own for this run.
            output: Whether the block's output is needed; without it the run ends at the last
                linear's input.
            dense: The dense run of the same prefix; its statistics of the first group are shared,
                since nothing pruned lies before it, and comparing accumulators read its inputs.
            keep_inputs: Keep every group's input for comparing accumulators.

        Returns:
            Statistics by linear, and the state behind the block.
        """
        wanted = [a for a in accumulators if dense is not None or not a.compares]
        compares = any(a.compares for a in wanted)
        # Nothing pruned lies before the first group: its statistics are the dense run's.
        known = block.linears[0].group if dense is not None and not compares else None
        collectors = {
            x.group: Collector(wanted, x.in_features)
            for x in block.linears
            if accumulators and x.group != known
        }
        last_group = block.linears[-1].group
        overlay = {
            f"{name.removeprefix(block.name + '.')}.weight": weight
            for name, weight in (weights or {}).items()
        }
        kept: list[dict[int, Tensor]] = [{} for _ in inputs.batches]
        behind: list[Carried] = []

        def observe(i: int, size: int, group: int, x: Tensor) -> None:
            x = x.reshape(size, -1, x.shape[-1])  # some blocks flatten windows and tokens
            if keep_inputs:
                kept[i][group] = x
            if group in collectors:
                collectors[group].update(x, dense.inputs[i][group] if dense and compares else None)
            if not output and group == last_group:
                raise _Stop

        for i, (batch, carried) in enumerate(zip(inputs.batches, prefix.carried, strict=True)):
            size = batch.ids.shape[0]
            self._observe = partial(observe, i, size)
            try:
                result = self._call(batch.calls[block.index], carried, module, overlay)
                behind.append(self._hand_on(block, inputs, carried, result))
            except _Stop:
                pass
            finally:
                self._observe = None
            self.block_runs += size
        results = {group: collector.statistics() for group, collector in collectors.items()}
        statistics: LinearStatistics = {}
        for x in block.linears if accumulators else ():
            if dense is not None and x.group == known:
                statistics[x.name] = dense.statistics[x.name]
            else:
                statistics[x.name] = results[x.group]
        return Pass(statistics, Prefix(behind) if output else None, kept if keep_inputs else [])

    def _call(
        self, call: _Call, carried: Carried, module: nn.Module, overlay: dict[str, Tensor]
    ) -> Any:
        leaves = [carried[(x.block, x.leaf)] if isinstance(x, _Output) else x for x in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        with torch.no_grad():
            if overlay:
                return functional_call(module, overlay, args, kwargs)
            return module(*args, **kwargs)

    def _hand_on(self, block: Block, inputs: Inputs, carried: Carried, result: Any) -> Carried:
        """Return what later blocks still read, with the block's own results added."""
        behind = {k: v for k, v in carried.items() if inputs.last_use.get(k, -1) > block.index}
        final = block.index == len(self._blocks) - 1
        for k, leaf in enumerate(pytree.tree_leaves(result)):
            key = (block.index, k)
            if isinstance(leaf, Tensor) and (key in inputs.last_use or (final and k == 0)):
                behind[key] = leaf
        return behind
