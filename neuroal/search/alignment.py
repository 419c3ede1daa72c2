"""How far a candidate's activations are from the dense model's: one walk for many candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from neuroal.errors import NeuroalError, overflows
from neuroal.layout import Block, Layout, Linear
from neuroal.plugins import Plugin, checks
from neuroal.pruning.hooks import updates_weights
from neuroal.pruning.pruner import BasePruner, ScoreCache
from neuroal.search.outcomes import Outcome, Trial
from neuroal.search.places import (
    Place,
    can_go_on_from_here,
    lend_again,
    place_after,
    place_in_block,
    recalled,
)
from neuroal.search.trial_walks import (
    BlockPass,
    PassedBlock,
    TrialWalk,
    lenders_first,
)
from neuroal.types import Measurement, Tick
from neuroal.walk import BlockRun, CandidateState, Inputs, Walker
from neuroal.walk.activations import Store
from neuroal.walk.allocator import give_back
from neuroal.walk.bookmark import Bookmark
from neuroal.walk.statistics import resolve
from neuroal.walk.stubs import BlockOutputs


@dataclass
class Aligner:
    """Measures candidates with one base pruner, without refiner, and one alignment metric.

    With `deviation`, outcomes carry the deviation of input norms.
    """

    walker: Walker
    pruner: BasePruner
    metric: Plugin
    deviation: bool
    _dense_output: dict[int, Store[BlockOutputs]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        norm = frozenset({"input_norm"} if self.deviation else ())
        read = self.metric.statistic_names() | norm
        needed = self.metric.required_statistics() | norm
        self._dense_statistics = resolve(needed | self.pruner.pruner.required_statistics())
        self._pruned_statistics = tuple(a for a in self._dense_statistics if a.name in read)
        self._compared_statistics = tuple(resolve(self.metric.required_statistics()))
        self._compares = any(a.compares for a in self._pruned_statistics)
        self._at_output = self.metric.has("measure_output")
        if not self._at_output and not self.metric.required_statistics():
            raise self.metric.error(
                "required_statistics", "names nothing for measure_linear to read"
            )

    @property
    def layout(self) -> Layout:
        """Return the model's layout."""
        return self.walker.layout

    def measure(
        self,
        trials: Sequence[Trial],
        inputs: Inputs,
        tick: Tick = int,
        bookmark: Bookmark | None = None,
    ) -> list[Outcome]:
        """Return the candidates' outcomes in order: all pass a block before the next.

        Args:
            trials: The candidates.
            inputs: The search windows.
            tick: Called once per candidate and block.
            bookmark: Keeps how far they have come, and knows how far an earlier try came.

        Raises:
            PluginError: The metric answered with something that is not a number >= 0.
        """
        start = CandidateState.start(inputs)
        walks = [TrialWalk(trial, start) for trial in trials]
        in_order = lenders_first(walks, start)
        mark = bookmark or Bookmark()
        place = recalled(mark, self.walker, in_order)
        for _ in range(place.ticks(in_order, len(self.layout.blocks))):
            tick()
        with torch.no_grad():
            for block in self.layout.blocks[place.block :]:
                here = place if block.index == place.block else Place(block.index)
                with self.walker.block(block, inputs.dtype) as module:
                    left = [w for w in in_order[here.passed :] if not w.dropped]
                    waiting = Counter(id(w.state) for w in left)
                    scores = ScoreCache(unchecked=self.walker.unchecked)
                    at = BlockPass(
                        block, module, inputs, waiting, counted=here.counted_ids, scores=scores
                    )
                    lend_again(at, here, in_order)
                    self._pass(at, in_order, here.passed, tick, mark)
            if self._at_output:
                done = place.passed if place.block == len(self.layout.blocks) else 0
                self._measure_output(inputs, walks, in_order, done, mark)
        return self._outcomes(walks)

    def _pass(
        self, at: BlockPass, walks: list[TrialWalk], passed: int, tick: Tick, mark: Bookmark
    ) -> None:
        """Take every candidate through one block, but for those that have `passed` it.

        Candidates that come from the same state share the dense run (all of them in the first
        block), and those that also prune the block alike share everything.
        """
        for k, walk in enumerate(walks[passed:], passed + 1):
            if walk.counts:
                tick()
            if walk.dropped:
                continue
            before = self.walker.block_runs
            state, _, targets = key = at.key(walk)
            if key not in at.known:
                # Kept only if another candidate can use them and blocks are not streamed.
                reads = bool(self.pruner.pruner.required_statistics())
                at.scores.keep = not self.walker.streams and (at.waiting[state] > 1 or not reads)
                at.known[key] = self._passed(at, walk, at.reused(walk, targets))
            if walk.lends:
                at.lent[id(walk)] = state, targets, at.known[key].weights
            at.leave(state)
            walk.add(at.known[key], self.walker.block_runs - before)
            if mark.due() and can_go_on_from_here(at, walks[k:]):
                self._look(walks[:k])
                mark.keep(place_in_block(at, walks, k))
        self._look(walks)

    def _look(self, passed: Sequence[TrialWalk]) -> None:
        """Refuse what is not finite, and drop candidates above their limit; waits once."""
        limited = [
            (walk, walk.trial.limit, walk.total)
            for walk in passed
            if walk.trial.limit is not None and isinstance(walk.total, Tensor)
        ]
        totals = self.walker.unchecked.look(*(total for _, _, total in limited))
        for (walk, limit, _), total in zip(limited, totals, strict=True):
            walk.dropped = total > limit

    def _passed(
        self, at: BlockPass, walk: TrialWalk, reused: Mapping[str, Tensor] | None
    ) -> PassedBlock:
        """Run one candidate's block: dense for the statistics, pruned for the next block's input.

        With weights that are reused the pruner reads no statistics, and no deviation is measured.
        """
        last = at.block.index == len(self.layout.blocks) - 1
        output = not last or self._at_output
        targets = walk.trial.targets
        if not any(targets[x.name].counts.any() for x in at.block.linears if x.name in targets):
            return self._unpruned(at, walk, output)
        dense = self._dense_run(at, walk, reused is not None)
        if not output and not self._pruned_statistics:
            return PassedBlock(walk.state)
        weights = self._pruned_weights(at, walk, dense) if reused is None else dict(reused)
        read = self._pruned_statistics if reused is None else self._compared_statistics
        pruned = self.walker.run(
            at.block, at.module, at.inputs, walk.state, read,
            weights=weights, output=output, dense=dense,
        )  # fmt: skip
        misalignment, deviation = self._compare(at.block, dense, pruned, reused is None)
        state = pruned.state or walk.state
        return PassedBlock(state, misalignment, deviation, weights if walk.lends else None)

    def _unpruned(self, at: BlockPass, walk: TrialWalk, output: bool) -> PassedBlock:
        """Run a block in which no weight is pruned: its misalignment is 0."""
        state = None
        if output:
            state = self.walker.run(at.block, at.module, at.inputs, walk.state).state
        device = self.walker.device
        zeros = {x.name: torch.zeros(x.in_features, device=device) for x in at.block.linears}
        return PassedBlock(state or walk.state, deviation=zeros if self.deviation else {})

    def _dense_run(self, at: BlockPass, walk: TrialWalk, reuses: bool) -> BlockRun | None:
        """Return the dense run from a candidate's state; None where nobody reads its statistics."""
        known = at.dense.get(id(walk.state))
        counted = id(walk.state) in at.counted
        read = self._compared_statistics if reuses and not counted else self._dense_statistics
        if known is not None or not read:
            return known
        before = self.walker.block_runs
        dense = self.walker.run(
            at.block, at.module, at.inputs, walk.state, read,
            output=False, keep_inputs=self._compares,
        )  # fmt: skip
        if updates_weights(self.pruner.pruner):  # it waits for the device anyway
            self.walker.unchecked.look()
        if counted:
            self.walker.block_runs = before
        if counted or not reuses:
            at.dense[id(walk.state)] = dense
        return dense

    def _pruned_weights(
        self, at: BlockPass, walk: TrialWalk, dense: BlockRun | None
    ) -> dict[str, Tensor]:
        """Return the block's pruned weights `(out, in)`, in the dtype of the search."""
        statistics = dense.statistics if dense is not None else {}
        own = self.walker.module(at.block)
        weights = self.pruner.prune_block(at.block, own, statistics, walk.trial.targets, at.scores)
        dtype = at.inputs.dtype
        return weights if dtype is None else {name: w.to(dtype) for name, w in weights.items()}

    def _compare(
        self, block: Block, dense: BlockRun | None, pruned: BlockRun, deviates: bool
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Return the block's misalignment, and its deviation `(in,)` by linear if asked for."""
        total: Tensor | float = 0.0
        deviation: dict[str, Tensor] = {}
        if dense is None:
            return total, deviation
        for x in block.linears:
            if not self._at_output and self._is_comparable(x, dense, pruned):
                value = self.metric.call(
                    "measure_linear",
                    dense=dense.statistics[x.name], pruned=pruned.statistics[x.name], linear=x,
                )  # fmt: skip
                total = total + self._number(value, "measure_linear")
            if self.deviation and deviates:
                a, b = dense.statistics[x.name], pruned.statistics[x.name]
                deviation[x.name] = a.input_norm - b.input_norm  # (in,)
        return total, deviation

    def _is_comparable(self, linear: Linear, dense: BlockRun, pruned: BlockRun) -> bool:
        """Return whether a metric can compare a linear's inputs.

        A token that is routed to an expert may have no counterpart, and an expert may see none.
        """
        if linear.expert is None:
            return True
        seen = dense.statistics[linear.name].tokens and pruned.statistics[linear.name].tokens
        return bool(seen) and not self._compares

    def _measure_output(
        self,
        inputs: Inputs,
        walks: list[TrialWalk],
        in_order: list[TrialWalk],
        done: int,
        mark: Bookmark,
    ) -> None:
        """Average the output metric over windows; the reference is the dense walk's output.

        Of the batches, one after the other and of each all candidates, `done` are measured already.
        """
        reference = self._dense_output_of(inputs)
        unchecked = self.walker.unchecked
        overflow = partial(self._overflow, inputs.dtype)
        first, k = divmod(done, len(walks))
        for i, ids in enumerate(inputs.batches[first:], first):
            dense = self.walker.logits(ids, reference[i])  # (windows, tokens, vocabulary)
            unchecked.add(checks.finite(dense), overflow)
            share = ids.shape[0] / inputs.windows
            for walk in walks[k:]:
                pruned = self.walker.logits(ids, walk.state.outputs[i], walk.state.weights)
                unchecked.add(checks.finite(pruned), overflow)
                value = self.metric.call("measure_output", dense_logits=dense, pruned_logits=pruned)
                walk.total = walk.total + self._number(value, "measure_output") * share
                del pruned
                give_back()
                done += 1
                if mark.due():
                    unchecked.look()
                    mark.keep(place_after(len(self.layout.blocks), in_order, done))
            k = 0

    def _overflow(self, dtype: torch.dtype | None) -> NeuroalError:
        name = str(dtype or self.walker.dtype).removeprefix("torch.")
        option = "--dtype" if dtype is None else "--search-dtype"
        return NeuroalError(overflows("logits of the model are", name, option))

    def _dense_output_of(self, inputs: Inputs) -> Store[BlockOutputs]:
        if inputs.windows not in self._dense_output:
            self._dense_output[inputs.windows] = self.walker.through(inputs).outputs
        return self._dense_output[inputs.windows]

    def _number(self, value: object, hook: str) -> Tensor:
        if isinstance(value, Tensor) and value.dim() == 0:
            # Nothing waits for the device here: what is below 0 becomes NaN and is seen at the end.
            return value.double().where(value >= 0, torch.nan)
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise self.metric.error(hook, f"returned {what}, not a 0-d tensor")

    def _outcomes(self, walks: Sequence[TrialWalk]) -> list[Outcome]:
        """Return the outcomes of candidates at the end; waits for the device once."""
        totals = [w.total for w in walks]
        made = iter(self.walker.unchecked.look(*(x for x in totals if isinstance(x, Tensor))))
        numbers = [next(made) if isinstance(x, Tensor) else x for x in totals]
        return [self._outcome(w, total) for w, total in zip(walks, numbers, strict=True)]

    def _outcome(self, walk: TrialWalk, total: float) -> Outcome:
        if not 0 <= total < float("inf"):
            hook = "measure_output" if self._at_output else "measure_linear"
            raise self.metric.error(hook, "returned NaN, infinity or a number below 0")
        deviation = {} if walk.first is not None else walk.deviation
        return Outcome(Measurement(total, walk.dropped, walk.block_runs), deviation)
