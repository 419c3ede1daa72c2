"""One pass over the blocks for one or many allocations; the only place that runs the model.

Calibration windows go through the model's own embeddings and reach `Inputs` together with every
argument that the model gives its blocks. A walk then sends hidden states through block after
block: dense, collecting statistics, and with pruned weights laid over the dense ones. The model's
own weights change in `commit` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from neuroal.distributed import ALONE, Team
from neuroal.errors import NeuroalError, UsageError
from neuroal.layout import Block, Layout, Linear
from neuroal.layout import matrices as matrices
from neuroal.layout.matrices import Place, Products
from neuroal.types import Accumulator
from neuroal.walk.activations import MakeStore, Store
from neuroal.walk.all_experts import every_expert
from neuroal.walk.block_arguments import BlockArguments
from neuroal.walk.statistics import Collector, Statistics
from neuroal.walk.stubs import BlockCall, BlockOutputs, OutputKey

CPU_TOKENS, DEVICE_TOKENS = 2048, 16384  # tokens of one batch

LinearStatistics = dict[str, Statistics]
_Inputs = dict[int, list[Tensor]]  # of groups, one for every time the group ran
OpenBlock = Callable[[Block], AbstractContextManager[nn.Module]]
Tree = TypeVar("Tree")


@dataclass
class CandidateState:
    """The state of one candidate between two blocks.

    Attributes:
        carried: What its blocks handed on, per batch.
        weights: Its pruned parameters that later blocks share, or whose block runs again, by name.
    """

    carried: Store[BlockOutputs]
    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, inputs: Inputs) -> CandidateState:
        return cls([{} for _ in inputs.batches])


@dataclass(frozen=True)
class Inputs:
    """Calibration windows, ready to walk.

    Attributes:
        batches: Token ids `(windows, length)`, in window order.
        calls: By block the arguments that the model passes to it, per batch.
        windows: Number of windows.
        last_use: The last block that reads what is carried; the number of blocks for the model.
        team: The processes that have a part of the windows each; statistics are of all.
        dtype: Of the blocks that run, and of what they are given; None is the model's own.
    """

    batches: tuple[Tensor, ...]
    calls: tuple[Store[BlockCall], ...]
    windows: int
    last_use: Mapping[OutputKey, int]
    team: Team = ALONE
    dtype: torch.dtype | None = None


@dataclass
class BlockRun:
    """What one pass of one prefix through one block gave.

    Attributes:
        statistics: By linear name; linears that share an input share the object.
        prefix: The state behind the block; None if its output was not asked for.
        inputs: Group inputs per batch, one for every time the group ran, kept for accumulators that
            compare.
    """

    statistics: LinearStatistics
    prefix: CandidateState | None
    inputs: Store[_Inputs] = field(default_factory=list)


class _Stop(Exception):
    """Ends a block's forward pass once everything that is read has been seen."""


def _cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Return a tree with its floating tensors in another dtype, within the range of that."""
    limits = torch.finfo(dtype)  # masks hold the lowest number of their own dtype

    def cast(x: object) -> object:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if limits.max < torch.finfo(x.dtype).max:
            x = x.clamp(limits.min, limits.max)
        return x.to(dtype)

    return pytree.tree_map(cast, tree)  # type: ignore[no-any-return]


def batch_size(device: torch.device, length: int) -> int:
    """Return how many windows of so many tokens pass a block together."""
    return max(1, (CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS) // length)


class Walker:
    """Runs a model's blocks one by one, exactly as the model itself would.

    Attributes:
        model: The causal language model, in evaluation mode.
        layout: Its layout.
        batch: Windows of a batch where `inputs` is not told; None is by their tokens.
        block_runs: Blocks times windows run so far.
        streams: Whether a block is in memory only while it is open.
        all_experts: Statistics of experts are of all tokens, not of those routed to them.
        hold: Makes the sequences in which activations are held between blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        open_block: OpenBlock | None = None,
        batch: int | None = None,
        all_experts: bool = False,
        hold: MakeStore = list,
    ) -> None:
        self.model = model
        self.batch = batch
        self.all_experts = all_experts
        self.hold = hold
        self.layout = layout
        self.block_runs = 0
        self._open = open_block or (lambda b: nullcontext(model.get_submodule(b.name)))
        modules = [model.get_submodule(b.name) for b in layout.blocks]
        self.streams = any(p.is_meta for m in modules for p in m.parameters())
        self._block_arguments = BlockArguments(model, layout.blocks, self._open)
        if self.streams and self._block_arguments.again:
            again = layout.blocks[min(self._block_arguments.again)].name
            raise NeuroalError(f"block {again} runs again later: it cannot be read one at a time")
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._shared = {name: x[0] for x in names.values() if len(x) > 1 for name in x}

    @property
    def device(self) -> torch.device:
        """Return the device of the model's first parameter that is in memory."""
        return next(p.device for p in self.model.parameters() if not p.is_meta)

    # -- inputs ------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the model's first floating parameter."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def inputs(
        self,
        ids: Tensor,
        batch: int | None = None,
        team: Team = ALONE,
        dtype: torch.dtype | None = None,
    ) -> Inputs:
        """Return windows ready to walk.

        Args:
            ids: int64 `(windows, length)`.
            batch: Windows per batch; None is the walker's own.
            team: Processes that share the windows: this one gets its part.
            dtype: Of blocks that run in another than the model's own.

        Raises:
            UsageError: There are more processes than windows.
        """
        if len(ids) < team.size:
            raise UsageError(f"{team.size} processes share {len(ids)} windows: start fewer")
        ids = team.part(ids)
        batch = batch or self.batch or batch_size(self.device, ids.shape[1])
        batches = torch.split(ids.to(self.device), batch)
        calls = tuple(self.hold() for _ in self.layout.blocks)
        last_use: dict[OutputKey, int] = {}
        for part in batches:
            captured = self._block_arguments.capture(part)
            last_use = last_use or self._block_arguments.last_use(captured)
            for held, call in zip(calls, captured, strict=True):
                held.append(call)
        return Inputs(batches, calls, len(ids), last_use, team, dtype)

    def logits(
        self, ids: Tensor, carried: BlockOutputs, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return logits `(windows, tokens, vocabulary)` from what the blocks handed on.

        Args:
            ids: The windows of a batch.
            carried: Of a prefix behind the last block.
            weights: Of the same prefix.
        """
        carried = _cast(carried, self.dtype)
        return self._block_arguments.logits(ids, carried, self._overlays(weights or {}))

    # -- one block ---------------------------------------------------------------------------

    def block(self, block: Block) -> AbstractContextManager[nn.Module]:
        """Hold one block."""
        return self._open(block)

    def run(
        self,
        block: Block,
        module: nn.Module,
        inputs: Inputs,
        prefix: CandidateState,
        accumulators: Sequence[Accumulator] = (),
        *,
        weights: Mapping[str, Tensor] | None = None,
        output: bool = True,
        dense: BlockRun | None = None,
        keep_inputs: bool = False,
    ) -> BlockRun:
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
            x.group: Collector(_of(wanted, x), x.in_features)
            for x in block.linears
            if accumulators and x.group != known
        }
        last_group = block.linears[-1].group
        linears = {x.name: x for x in block.linears}
        overlay = matrices.overlay(linears, weights or {}, module, block.name)
        behind_weights = prefix.weights | self._kept(block, overlay)
        overlay |= self._from_earlier(block, module, prefix.weights)
        # Of the linears that share an input, the first to run reports it.
        first = {x.place: x for x in {x.group: x for x in reversed(block.linears)}.values()}
        parameters = {
            x.place.parameter: _parameter(x, block, module, overlay) for x in block.linears
        }
        kept, behind = self.hold(), self.hold()

        experts = bool(collectors) and any(x.expert is not None for x in block.linears)
        shows = self.all_experts and experts
        showing: Callable[[], bool] | None = None

        def observe(
            seen: _Inputs, others: _Inputs, size: int, runs: Counter[int],
            place: Place, _: tuple[int, int], x: Tensor,
        ) -> None:  # fmt: skip
            linear = first.get(place)
            if linear is None:
                return
            group = linear.group
            collector = collectors.get(group)
            if linear.expert is not None:
                if collector is not None and (showing is None or showing()):
                    _update_routed(collector, x, size)
                runs[group] += 1
                return
            x = x.reshape(size, -1, x.shape[-1])  # some blocks flatten windows and tokens
            if keep_inputs:
                seen.setdefault(group, []).append(x)
            if collector is not None:
                collector.update(x, others[group][runs[group]] if others else None)
            runs[group] += 1
            if not output and group == last_group:
                raise _Stop

        given_to = inputs.calls[block.index]
        batches = zip(inputs.batches, given_to, prefix.carried, strict=True)
        for i, (ids, call, carried) in enumerate(batches):
            size = ids.shape[0]
            runs: Counter[int] = Counter()
            seen: _Inputs = {}
            others = dense.inputs[i] if dense is not None and compares else {}
            observing = (
                Products(parameters, partial(observe, seen, others, size, runs))
                if collectors or keep_inputs or not output
                else nullcontext()
            )
            try:
                # The model computes in its own dtype what it gives its blocks.
                given = carried if inputs.dtype is None else _cast(carried, self.dtype)
                args, kwargs = self._block_arguments.arguments(
                    block.index, call, ids, given, self._overlays(prefix.weights)
                )
                if inputs.dtype is not None:
                    args, kwargs = _cast((args, kwargs), inputs.dtype)
                routing = every_expert(block, module) if shows else nullcontext()
                with observing, torch.no_grad(), routing as showing:
                    result = (
                        functional_call(module, overlay, args, kwargs)
                        if overlay
                        else module(*args, **kwargs)
                    )
                handed = carried | self._block_arguments.returned(block.index, args, kwargs, result)
                last = inputs.last_use
                behind.append({k: v for k, v in handed.items() if last.get(k, -1) > block.index})
            except _Stop:
                pass
            for x in first.values():  # experts that no token of this batch was routed to
                if x.expert is not None and x.group in collectors and not runs[x.group]:
                    nothing = torch.zeros((0, x.in_features), device=ids.device)
                    _update_routed(collectors[x.group], nothing, size)
            if keep_inputs:
                kept.append(seen)
            self.block_runs += size
        results = {
            group: collector.statistics(inputs.team) for group, collector in collectors.items()
        }
        statistics: LinearStatistics = {}
        for x in block.linears if accumulators else ():
            if dense is not None and x.group == known:
                statistics[x.name] = dense.statistics[x.name]
            else:
                statistics[x.name] = results[x.group]
        after = CandidateState(behind, behind_weights) if output else None
        return BlockRun(statistics, after, kept)

    def _kept(self, block: Block, overlay: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which of a block's pruned parameters are needed behind it."""
        again = block.index in self._block_arguments.again
        named = {f"{block.name}.{key}": value for key, value in overlay.items()}
        return {self._shared.get(n, n): x for n, x in named.items() if again or n in self._shared}

    def _from_earlier(
        self, block: Block, module: nn.Module, weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return pruned parameters of earlier blocks that a block shares, by name within it."""
        if not weights:
            return {}
        names = {key: f"{block.name}.{key}" for key, _ in module.named_parameters()}
        known = {key: self._shared.get(name, name) for key, name in names.items()}
        return {key: weights[name] for key, name in known.items() if name in weights}

    def _overlays(self, weights: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """Return pruned parameters of the blocks that run again."""
        made = {}
        for index in self._block_arguments.again if weights else ():
            block = self.layout.blocks[index]
            module = self.model.get_submodule(block.name)
            made[index] = _cast(self._from_earlier(block, module, weights), self.dtype)
        return made


def _of(accumulators: Sequence[Accumulator], linear: Linear) -> list[Accumulator]:
    """Return what is collected for a linear: tokens routed to an expert have none to compare to."""
    return [a for a in accumulators if linear.expert is None or not a.compares]


def _parameter(
    linear: Linear, block: Block, module: nn.Module, overlay: Mapping[str, Tensor]
) -> Tensor:
    key = matrices.local(linear, block.name)
    return overlay[key] if key in overlay else module.get_parameter(key)


def _update_routed(collector: Collector, x: Tensor, windows: int) -> None:
    """Add tokens `x (..., in)` of a batch's windows that were routed to an expert.

    Which window a token is from is not known: equal shares stand for them, so that sums over the
    windows are right, and independent of the batch.
    """
    if x.dim() > 2:  # all tokens in a batched product; those of other experts are zero
        x = x.reshape(-1, x.shape[-1])
        x = x[x.any(dim=-1)]
    for part in torch.tensor_split(x, windows):
        collector.update(part[None])
