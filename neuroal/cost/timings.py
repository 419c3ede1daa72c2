"""How long a run will take: every kind of work that it does, timed on one block of its shapes.

The block is one of random weights, made by the model's own code; nothing of the model is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.cost.preparation import Prepared
from neuroal.cost.texts import TextSize, in_longest
from neuroal.evaluation.perplexity import cross_entropy, embedding_of, forward_windows
from neuroal.layout import Block, find
from neuroal.model import memory, pretrained
from neuroal.plugins import Plugin
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.pruner import BasePruner, spare_copies
from neuroal.pruning.targets import targets
from neuroal.run.reconstruction import Reconstruction, batch_windows, stages
from neuroal.run.setup import Setup, search_dtype
from neuroal.types import Target
from neuroal.walk import BlockRun, CandidateState, Walker, batch_size
from neuroal.walk.states import LinearStatistics
from neuroal.walk.statistics import resolve
from neuroal.walk.stubs import BlockOutputs

_VOCABULARY = 1024
_PER_WINDOW = {"dense", "pruned", "final_dense", "final_pruned", "logits"}
_QUICK, _TIMES = 1.0, 10  # what is over in less than a second is timed again: the least counts

RunBlock = Callable[..., BlockRun]  # of the block, from its start: the rest is as in `Walker.run`
PruneBlock = Callable[[Plugin | None, LinearStatistics], dict[str, Tensor]]


def time_block(prepared: Prepared, length: int, texts: Sequence[TextSize] = ()) -> dict[str, float]:
    """Return the seconds of every kind of `Work` that a run does, on windows of `length` tokens.

    The evaluation's are on the longest windows of `texts`.

    Raises:
        NeuroalError: The family cannot be made with one block.
    """
    setup, recipe = prepared.setup, prepared.recipe
    assert recipe.model is not None
    device = memory.device_of(recipe.device)
    evaluated, longest = in_longest(texts)
    words = None if evaluated or setup.alignment.has("measure_output") else _VOCABULARY
    trust = prepared.trust_remote_code
    model = pretrained.one_block(recipe.model, device, recipe.dtype, words, trust)
    layout = find(model)
    walker = Walker(model, layout)
    (block,) = layout.blocks
    rules = setup.rules(replace(recipe, keep=(), only=()), layout)  # of a block that is pruned
    ratios = dict.fromkeys(layout.linears, prepared.rules.ratio(prepared.layout))
    windows = min(recipe.samples, recipe.batch or batch_size(torch.device(device), length))
    rng = torch.Generator().manual_seed(0)
    vocabulary = len(embedding_of(model))
    ids = torch.randint(vocabulary, (windows, length), generator=rng)
    inputs = walker.inputs(ids, batch=windows)
    goals = targets(Allocation.of(ratios, layout), layout, rules)
    clock = _Clock(device)
    dtype = search_dtype(recipe)
    with walker.block(block, dtype) as cast, torch.no_grad():
        module, cast_inputs = walker.module(block), replace(inputs, dtype=dtype)
        run: RunBlock = partial(walker.run, block, module, inputs, CandidateState.start(inputs))
        search_run: RunBlock = partial(
            walker.run, block, cast, cast_inputs, CandidateState.start(cast_inputs)
        )

        def prune(refiner: Plugin | None, statistics: LinearStatistics) -> dict[str, Tensor]:
            pruner = BasePruner(setup.pruner, refiner, recipe.seed)
            return pruner.prune_block(block, module, statistics, goals)

        _time_search(clock, setup, search_run, prune, dtype)
        pruned = _time_final_pruning(clock, setup, run, prune)
        more = _reconstruction_times(device, prepared, walker, ids, module, goals, pruned)
        if setup.alignment.has("measure_output"):
            _time_output_metric(clock, setup, run, partial(walker.logits, inputs.batches[0]))
        if setup.measures:
            _time_measures(clock, setup, run, block, module)
    spent = {k: v / (windows if k in _PER_WINDOW else 1) for k, v in clock.spent.items()}
    if evaluated:
        together = min(forward_windows(longest, vocabulary), evaluated)
        ids = torch.randint(vocabulary, (together, longest), generator=rng)
        spent |= _time_evaluation(walker, ids, device)
    return more | spent


def _time_search(
    clock: _Clock, setup: Setup, run: RunBlock, prune: PruneBlock, dtype: torch.dtype | None
) -> None:
    """Time a candidate's block: dense, pruned, and the pruning itself."""
    norm = frozenset({"input_norm"} if setup.reads_deviation else ())
    read = setup.alignment.statistic_names() | norm
    of_plugins = [p.required_statistics() for p in (setup.alignment, setup.pruner)]
    accumulators = resolve(norm.union(*of_plugins))
    compared = tuple(a for a in accumulators if a.name in read)
    keeps = any(a.compares for a in compared)
    dense = clock("dense", lambda: run(accumulators, output=False, keep_inputs=keeps))
    statistics = dense.statistics if accumulators else {}
    weights = clock("prune", lambda: prune(None, statistics))
    cast = {name: weight.to(dtype or weight.dtype) for name, weight in weights.items()}
    clock("pruned", lambda: run(compared, weights=cast, dense=dense))


def _time_final_pruning(
    clock: _Clock, setup: Setup, run: RunBlock, prune: PruneBlock
) -> dict[str, Tensor]:
    """Time the final pruning of a block, and return its pruned weights."""
    required = resolve({s for p in setup.final for s in p.required_statistics()})
    statistics: LinearStatistics = {}
    if required or setup.reconstruction is not None:
        accumulators = resolve({*required, "input_norm"})
        dense = clock("final_dense", lambda: run(accumulators, output=False))
        names = {a.name for a in required}
        statistics = {name: x.only(names) for name, x in dense.statistics.items()}
        clock("final_pruned", lambda: run(resolve({"input_norm"})))
    weights: dict[str, Tensor] = clock("final_prune", lambda: prune(setup.refiner, statistics))
    return weights


def _reconstruction_times(
    device: str,
    prepared: Prepared,
    walker: Walker,
    ids: Tensor,
    module: nn.Module,
    goals: Mapping[str, Target],
    weights: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return the seconds of a unit of every kind of work that a reconstruction does."""
    plugin = prepared.setup.reconstruction
    if plugin is None:
        return {}
    clock, (block,) = _Clock(device), walker.layout.blocks
    windows = batch_windows(plugin, len(ids), ids.shape[1])
    inputs = walker.inputs(ids[:windows], batch=windows)
    new = Reconstruction(plugin, walker, inputs, prepared.recipe.seed)
    state = CandidateState.start(inputs)
    dense = clock("own", lambda: new.dense_run(block, module, state)) if new.reads_dense else None
    units = {"own": windows, "stage": 0, "reconstruct": 1, "differentiate": windows}
    if plugin.has("reconstruct_linear"):
        masks = {name: weight == 0 for name, weight in weights.items()}
        for stage in stages(block):
            read = partial(new.statistics, block, module, state, dense, stage, weights)
            statistics = clock("stage", read)
            solve = partial(new.linears, block, module, stage, weights, masks, goals, statistics)
            clock("reconstruct", solve)
            units["stage"] += windows
    if plugin.has("reconstruct_block") and dense is not None and dense.state is not None:
        leaves = {name: w.float().requires_grad_(True) for name, w in weights.items()}
        batch = new.batches(block, module, state, dense.state, leaves)[0]

        def differentiate() -> object:
            loss = (batch.run(leaves) - batch.target).square().mean()
            return torch.autograd.grad(loss, list(leaves.values()))

        with torch.enable_grad():
            clock("differentiate", differentiate)
    return {kind: seconds / units[kind] for kind, seconds in clock.spent.items()}


def _time_output_metric(
    clock: _Clock, setup: Setup, run: RunBlock, logits_of: Callable[[BlockOutputs], Tensor]
) -> None:
    state = run().state
    assert state is not None

    def measure_output() -> None:
        logits = logits_of(state.outputs[0])
        setup.alignment.call("measure_output", dense_logits=logits, pruned_logits=logits)

    clock("logits", measure_output)


def _time_evaluation(walker: Walker, ids: Tensor, device: str) -> dict[str, float]:
    """Return the seconds of a block, and of logits and loss, on one of some windows."""
    clock, (block,) = _Clock(device), walker.layout.blocks
    inputs = walker.inputs(ids, batch=len(ids))
    (tokens,) = inputs.batches
    start = CandidateState.start(inputs)
    with walker.block(block) as module, torch.no_grad():
        after = clock("evaluate", lambda: walker.run(block, module, inputs, start)).state
        outputs = after.outputs[0]
        clock("losses", lambda: cross_entropy(walker.logits(tokens, outputs), tokens))
    return {kind: seconds / len(ids) for kind, seconds in clock.spent.items()}


def _time_measures(
    clock: _Clock, setup: Setup, run: RunBlock, block: Block, module: nn.Module
) -> None:
    """Time the `measure_block` hooks; their dense walk is timed as the search's."""
    dense = run(resolve(s for p in setup.measures for s in p.required_statistics()))
    seen = {"block": block, "weights": spare_copies(block, module), "statistics": dense.statistics}
    for plugin in setup.measures:
        clock("measure", partial(plugin.call, "measure_block", **seen))


class _Clock:
    """Adds up the seconds of calls by name; what is quick is timed again, warm."""

    def __init__(self, device: str) -> None:
        self.spent: dict[str, float] = {}
        self._device = device

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        result, first = self._once(work)
        taken = [first]
        while first < _QUICK and sum(taken) < _QUICK and len(taken) < _TIMES:
            taken.append(self._once(work)[1])
        self.spent[name] = self.spent.get(name, 0.0) + min(taken)
        return result

    def _once(self, work: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        result = work()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        return result, time.perf_counter() - start
