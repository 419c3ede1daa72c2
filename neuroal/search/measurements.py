"""What several runs on one dense model have in common, made by the first run that needs it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuroal.data.windows import Windows
from neuroal.distributed import ALONE, Team
from neuroal.errors import NeuroalError
from neuroal.plugins import Plugin
from neuroal.pruning.pruner import spare_copies
from neuroal.recipe import Recipe
from neuroal.types import Tick
from neuroal.walk import CandidateState, Inputs, Walker
from neuroal.walk.bookmark import Bookmark
from neuroal.walk.statistics import resolve

Measurements = dict[Plugin, Sequence[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class _BlockAnswers:
    """One plugin's answers, and what the walk that gave them has cost."""

    answers: Sequence[Mapping[str, Tensor]]
    seconds: float
    block_runs: int


@dataclass(frozen=True, eq=False)
class SharedMeasurements:
    """Calibration windows and answers of `measure_block`, which runs on one dense model share.

    Give one object to all runs of one model, each of which begins with its dense weights: a result
    is the same as without. A run that finds an answer here reports the seconds and block runs that
    it has cost, so that runs can be compared whichever came first.
    """

    _windows: dict[str, Windows] = field(default_factory=dict)
    _answers: dict[str, _BlockAnswers] = field(default_factory=dict)

    def windows(self, recipe: Recipe, make: Callable[[], Windows]) -> Windows:
        """Return the windows of a recipe's calibration, made now or by an earlier run."""
        fields = ("calibration", "samples", "length", "seed", "window_bos", "pack_documents")
        key = json.dumps([getattr(recipe, name) for name in fields])
        if key not in self._windows:
            self._windows[key] = make()
        return self._windows[key]

    @property
    def calibrations(self) -> Sequence[Windows]:
        """Return the calibration windows made so far."""
        return tuple(self._windows.values())

    def measure(
        self,
        walker: Walker,
        data: Windows,
        plugins: Sequence[Plugin],
        open_tick: Callable[[], Tick] = lambda: int,
        team: Team = ALONE,
        dense: frozenset[str] = frozenset(),
        bookmark: Callable[[str], Bookmark] = lambda key: Bookmark(),
    ) -> tuple[Measurements, float]:
        """Return the plugins' answers about every block, and the seconds of the dense walk.

        The plugins have `measure_block`; those of role `block_ratios` see nothing of the linears
        in `dense`, and of no block without others. The walker's block runs count those of earlier
        walks too; `open_tick` opens a progress bar, where there is something to wait for, and
        `bookmark` keeps how far the walk has come.
        """
        decides = [data.sha256, sorted(dense)]
        keys = {p: json.dumps([p.provenance(), *decides], sort_keys=True) for p in plugins}
        unknown = [p for p in plugins if keys[p] not in self._answers]
        before = walker.block_runs
        if unknown:
            start = time.perf_counter()
            inputs = walker.inputs(data.ids, team=team)
            key = hashlib.sha256("".join(keys[p] for p in unknown).encode()).hexdigest()[:16]
            mark = bookmark(f"measure-{key}")
            answers = measure_blocks(walker, inputs, unknown, open_tick(), dense, mark)
            seconds, block_runs = time.perf_counter() - start, walker.block_runs - before
            for plugin, answer in zip(unknown, answers, strict=True):
                self._answers[keys[plugin]] = _BlockAnswers(answer, seconds, block_runs)
        known = {p: self._answers[key] for p, key in keys.items()}
        # One walk serves all plugins: together they cost what the dearest costs.
        walker.block_runs = before + max(x.block_runs for x in known.values())
        return {p: x.answers for p, x in known.items()}, max(x.seconds for x in known.values())


def measure_blocks(
    walker: Walker,
    inputs: Inputs,
    plugins: Sequence[Plugin],
    tick: Tick = int,
    dense: frozenset[str] = frozenset(),
    bookmark: Bookmark | None = None,
) -> list[list[Mapping[str, Tensor]]]:
    """Give every block to the `measure_block` hooks, in one dense walk over all windows.

    Block strategies are given what `dense` leaves of it, if anything. A `bookmark` keeps how far
    the walk has come.

    Returns:
        For every plugin its answers in block order.
    """
    needed = [statistic for plugin in plugins for statistic in plugin.required_statistics()]
    accumulators = resolve(needed)
    if any(a.compares for a in accumulators):
        raise NeuroalError("measure_block sees the dense model alone: no statistic can compare")
    answers: list[list[Mapping[str, Tensor]]] = [[] for _ in plugins]
    state = CandidateState.start(inputs)
    pruned = {block.name: block for block in walker.layout.without(dense).blocks}
    mark, done = bookmark or Bookmark(), 0
    kept = mark.recall(walker.make_store, walker.device)
    if kept is not None:
        state, answers, done = kept
    for _ in range(done):
        tick()
    with torch.no_grad():
        for block in walker.layout.blocks[done:]:
            last = block.index == len(walker.layout.blocks) - 1
            with walker.block(block) as module:
                statistics = {}
                if accumulators or not last:
                    result = walker.run(block, module, inputs, state, accumulators, output=not last)
                    state, statistics = result.state or state, result.statistics
                weights = spare_copies(block, module)
            walker.unchecked.look()
            for plugin, answer in zip(plugins, answers, strict=True):
                seen = pruned.get(block.name) if plugin.role == "block_ratios" else block
                if seen is not None:
                    arguments = {"block": seen, "weights": weights, "statistics": statistics}
                    answer.append(plugin.call("measure_block", **arguments))
            tick()
            if mark.due():
                given = [[dict(x) for x in answer] for answer in answers]
                mark.keep((state, given, block.index + 1))
    if mark.began:  # the answers alone
        given = [[dict(x) for x in answer] for answer in answers]
        mark.keep((CandidateState.start(inputs), given, len(walker.layout.blocks)))
    return answers
