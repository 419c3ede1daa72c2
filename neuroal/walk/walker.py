"""Runs a model block by block; the only place that runs the model.

Calibration windows go through the model's own embeddings and reach `Inputs` together with every
argument that the model passes to its blocks. A walk then sends hidden states through block after
block: dense, collecting statistics, and with pruned weights in place of the dense ones. The
model's own weights change in `run.commit` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuroal.distributed import ALONE, Team
from neuroal.errors import NeuroalError, UsageError, overflows
from neuroal.layout import Block, Layout, matrices
from neuroal.layout.matrices import Products
from neuroal.types import Accumulator
from neuroal.walk.activations import MakeStore
from neuroal.walk.all_experts import every_expert
from neuroal.walk.allocator import give_back
from neuroal.walk.block_arguments import BlockArguments
from neuroal.walk.observer import EndOfRun, Observer
from neuroal.walk.states import BlockRun, CandidateState, Inputs, LinearStatistics, cast_tree
from neuroal.walk.stubs import BlockCall, BlockOutputs, OpenBlock, OutputKey
from neuroal.walk.unchecked import Unchecked

CPU_TOKENS, DEVICE_TOKENS = 2048, 16384  # tokens of one batch
WATCHED = ("input_norm", "gram", "input_sum", "input_var")  # the first shows if inputs are finite


def batch_size(device: torch.device, length: int) -> int:
    """Return how many windows of a length in tokens pass a block together."""
    return max(1, (CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS) // length)


class Walker:
    """Runs a model's blocks one by one, exactly as the model itself would.

    Attributes:
        model: The causal language model, in evaluation mode.
        layout: Its layout.
        batch: Windows of a batch by default; None: as many as fit a fixed number of tokens.
        block_runs: Blocks times windows run so far.
        streams: Whether a block is in memory only while it is open.
        all_experts: Whether an expert's statistics are over all tokens, not those routed to it.
        make_store: Makes the stores that keep activations from block to block.
        unchecked: Whether inputs of linears are finite, and what others have added.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        open_block: OpenBlock | None = None,
        batch: int | None = None,
        all_experts: bool = False,
        make_store: MakeStore = list,
    ) -> None:
        self.model = model
        self.batch = batch
        self.all_experts = all_experts
        self.make_store = make_store
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
        self.unchecked = Unchecked()

    @property
    def device(self) -> torch.device:
        """Return the device of the model's first parameter that is in memory."""
        return next(p.device for p in self.model.parameters() if not p.is_meta)

    def opening(self, open_block: OpenBlock) -> Walker:
        """Return this walker with blocks that are opened otherwise; it counts its own runs."""
        other = copy(self)
        other._open = open_block
        return other

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
            team: Processes that share the windows: this process takes its part.
            dtype: In which the blocks run, if not the model's own.

        Raises:
            UsageError: There are more processes than windows.
        """
        if len(ids) < team.size:
            raise UsageError(f"{team.size} processes share {len(ids)} windows: start fewer")
        ids = team.part(ids)
        batch = batch or self.batch or batch_size(self.device, ids.shape[1])
        batches = torch.split(ids.to(self.device), batch)
        calls = tuple(self.make_store() for _ in self.layout.blocks)
        last_use: dict[OutputKey, int] = {}
        for part in batches:
            captured = self._block_arguments.capture(part)
            last_use = last_use or self._block_arguments.last_use(captured)
            for store, call in zip(calls, captured, strict=True):
                store.append(call)
        return Inputs(batches, calls, len(ids), last_use, team, dtype)

    def logits(
        self, ids: Tensor, outputs: BlockOutputs, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return logits `(windows, tokens, vocabulary)` of a batch's windows.

        `outputs` and `weights` are those of a candidate's state after the last block.
        """
        outputs = cast_tree(outputs, self.dtype)
        return self._block_arguments.logits(ids, outputs, self._overlays(weights or {}))

    # -- one block ---------------------------------------------------------------------------

    @contextmanager
    def block(self, block: Block, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """Yield a block's module, in memory while the context is open; with a dtype, a copy."""
        with self._open(block) as module:
            yield module if dtype is None else deepcopy(module).to(dtype)
        give_back()

    def module(self, block: Block) -> nn.Module:
        """Return a block's own module; it has weights only while the block is held."""
        return self.model.get_submodule(block.name)

    def through(self, inputs: Inputs) -> CandidateState:
        """Return the state after all blocks with the weights that they are opened with."""
        state = CandidateState.start(inputs)
        for block in self.layout.blocks:
            with self.block(block, inputs.dtype) as module:
                state = self.run(block, module, inputs, state).state or state
        return state

    def run(
        self,
        block: Block,
        module: nn.Module,
        inputs: Inputs,
        state: CandidateState,
        accumulators: Sequence[Accumulator] = (),
        *,
        weights: Mapping[str, Tensor] | None = None,
        output: bool = True,
        dense: BlockRun | None = None,
        keep_inputs: bool = False,
        groups: Collection[int] | None = None,
    ) -> BlockRun:
        """Run one block on the state of one candidate.

        Args:
            block: The block.
            module: Its module, from `Walker.block`.
            inputs: The windows.
            state: Of a candidate, before the block; not changed.
            accumulators: Statistics to collect; those that compare need `dense`.
            weights: Weights by linear name to lay over the module's own for this run.
            output: Whether the block's output is needed; without it the run ends at the last
                linear's input.
            dense: The dense run of the same state. Its statistics of the first group are used
                again, since that group's input is the same; accumulators that compare read the
                inputs that it kept.
            keep_inputs: Keep every group's input for comparing accumulators.
            groups: Groups of linears whose inputs are read; None reads all of them.

        Returns:
            Statistics by linear, and the state after the block. On the CPU, inputs that are not
            finite are refused at once; on a device, when `unchecked` is looked at.

        Raises:
            NeuroalError: Names the first linear, and the dtype that helps.
        """
        observer = Observer(
            block, accumulators, dense, output=output, keep_inputs=keep_inputs, groups=groups
        )
        linears = {x.name: x for x in block.linears}
        overlay = matrices.overlay(linears, weights or {}, module, block.name)
        weights_after = state.weights | self._read_later(block, overlay)
        overlay |= self._from_earlier(block, module, state.weights)
        outputs_after, kept_inputs = self.make_store(), self.make_store()
        batches = zip(inputs.batches, inputs.calls[block.index], state.outputs, strict=True)
        for i, (ids, call, outputs) in enumerate(batches):  # ids (windows, tokens)
            observer.start_batch(i, len(ids))
            arguments = self._arguments(block, inputs, state, ids, call, outputs)
            returned = self._forward(block, module, overlay, arguments, observer)
            if returned is not None:
                known = outputs | returned
                read_later = [k for k in known if inputs.last_use.get(k, -1) > block.index]
                outputs_after.append({k: known[k] for k in read_later})
            batch_inputs = observer.end_batch(ids.device)
            if keep_inputs:
                kept_inputs.append(batch_inputs)
            self.block_runs += len(ids)
        after = CandidateState(outputs_after, weights_after) if output else None
        statistics = observer.statistics(inputs.team)
        for name, finite in _finite(statistics):
            self.unchecked.add(finite, partial(self._overflow, name, inputs.dtype))
        if _at_once(self.device):
            self.unchecked.look()
        return BlockRun(statistics, after, kept_inputs)

    def _overflow(self, linear: str, dtype: torch.dtype | None) -> NeuroalError:
        """Return the error of inputs that are not finite: it names the dtype that helps."""
        name = str(dtype or self.dtype).removeprefix("torch.")
        option = "--dtype" if dtype is None else "--search-dtype"
        return NeuroalError(overflows(f"the input of {linear} is", name, option))

    def differentiable(
        self,
        block: Block,
        module: nn.Module,
        inputs: Inputs,
        state: CandidateState,
        batch: int,
        weights: Mapping[str, Tensor],
    ) -> Tensor:
        """Run one block on one batch, and return its output `(windows, tokens, hidden)`.

        The arguments are those of `run`, and the number of a batch. Autograd differentiates the
        output by `weights`, which are in the dtype of `module`.
        """
        ids, call = inputs.batches[batch], inputs.calls[block.index][batch]
        linears = {x.name: x for x in block.linears}
        overlay = matrices.overlay(linears, weights, module, block.name)
        overlay |= self._from_earlier(block, module, state.weights)
        args, kwargs = self._arguments(block, inputs, state, ids, call, state.outputs[batch])
        result = functional_call(module, dict(overlay), args, kwargs)
        self.block_runs += len(ids)
        returned = self._block_arguments.returned(block.index, args, kwargs, result)
        return self.hidden(block, inputs, returned)

    def hidden(self, block: Block, inputs: Inputs, outputs: BlockOutputs) -> Tensor:
        """Return the hidden state among what a block has returned: the first that is read later.

        Raises:
            NeuroalError: Nothing reads what the block returns.
        """
        for key in sorted((k for k in outputs if k[0] == block.index), key=str):
            x = outputs[key]
            read = inputs.last_use.get(key, -1) > block.index
            if read and isinstance(x, Tensor) and x.is_floating_point():
                return x
        raise NeuroalError(f"nothing reads the output of block {block.name}")

    def lends(self, block: Block) -> bool:
        """Return whether a later block shares weights of a block, or the block runs again."""
        named = [x.place.parameter for x in block.linears]
        again = block.index in self._block_arguments.again
        return again or any(name in self._shared for name in named)

    def _arguments(
        self,
        block: Block,
        inputs: Inputs,
        state: CandidateState,
        ids: Tensor,
        call: BlockCall,
        outputs: BlockOutputs,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a block is given for a batch, in the dtype in which it runs."""
        if inputs.dtype is not None:  # the model computes in its own what it gives its blocks
            outputs = cast_tree(outputs, self.dtype)
        overlays = self._overlays(state.weights)
        arguments = self._block_arguments.arguments(block.index, call, ids, outputs, overlays)
        return arguments if inputs.dtype is None else cast_tree(arguments, inputs.dtype)

    def _forward(
        self,
        block: Block,
        module: nn.Module,
        overlay: Mapping[str, Tensor],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        observer: Observer,
    ) -> BlockOutputs | None:
        """Run a block on a batch while an observer reads; return None if that ended the run."""
        args, kwargs = arguments
        shows_all = self.all_experts and observer.collects_experts
        routing = every_expert(block, module) if shows_all else nullcontext()
        try:
            watching = self._watching(block, module, overlay, observer)
            with watching, torch.no_grad(), routing as observer.counts_now:
                if overlay:
                    result = functional_call(module, dict(overlay), args, kwargs)
                else:
                    result = module(*args, **kwargs)
        except EndOfRun:
            return None
        return self._block_arguments.returned(block.index, args, kwargs, result)

    def _watching(
        self, block: Block, module: nn.Module, overlay: Mapping[str, Tensor], observer: Observer
    ) -> AbstractContextManager[object]:
        """Have an observer see the inputs of a block's products."""
        if not observer.reads:
            return nullcontext()
        parameters = {}
        for x in block.linears:
            key = matrices.local(x, block.name)
            own = overlay[key] if key in overlay else module.get_parameter(key)
            parameters[x.place.parameter] = own
        return Products(parameters, observer.observe)

    def _read_later(self, block: Block, overlay: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which of a block's pruned parameters are read after it."""
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
        overlays = {}
        for index in self._block_arguments.again if weights else ():
            block = self.layout.blocks[index]
            pruned = self._from_earlier(block, self.module(block), weights)
            overlays[index] = cast_tree(pruned, self.dtype)
        return overlays


def _at_once(device: torch.device) -> bool:
    """Return whether a number of a device can be read without waiting for other work."""
    return device.type == "cpu"


def _finite(statistics: LinearStatistics) -> Iterator[tuple[str, Tensor]]:
    """Yield the first linear of every group, and whether its input is finite, 0-d bool."""
    seen = set()
    for name, known in statistics.items():
        values = next((known[key] for key in WATCHED if key in known), None)
        if values is not None and id(known) not in seen:
            seen.add(id(known))
            diagonal = values.diagonal() if values.dim() == 2 else values
            yield name, diagonal.isfinite().all()
