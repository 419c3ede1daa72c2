"""How far a candidate's activations are from the dense model's: one walk for many candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.layout import Block, Layout, Linear
from neuroal.plugins import Plugin
from neuroal.pruning.pruner import BasePruner, ScoreCache
from neuroal.search.outcomes import Outcome, Trial
from neuroal.types import Measurement, Target, Tick
from neuroal.walk import BlockRun, CandidateState, Inputs, Walker
from neuroal.walk.activations import Store
from neuroal.walk.statistics import resolve
from neuroal.walk.stubs import BlockOutputs


@dataclass
class _State:
    trial: Trial
    state: CandidateState
    first: _State | None = None
    leads: bool = False
    ticks: bool = True
    total: Tensor | float = 0.0
    dropped: bool = False
    runs: int = 0
    deviation: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    """What one block adds to a candidate, and the weights that others may reuse."""

    state: CandidateState
    misalignment: Tensor | float
    deviation: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] | None = None


@dataclass
class Aligner:
    """Measures candidates with one base pruner and one alignment metric.

    Attributes:
        walker: Runs the model.
        pruner: Prunes the candidates; without refiner.
        metric: Plugin of role `alignment`.
        deviation: Whether outcomes carry the deviation of input norms.
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

    def measure(self, trials: Sequence[Trial], inputs: Inputs, tick: Tick = int) -> list[Outcome]:
        """Measure candidates side by side: all pass a block while it is at hand.

        Args:
            trials: The candidates.
            inputs: Search windows.
            tick: Called once per candidate and block.

        Returns:
            An outcome per candidate, in order.

        Raises:
            PluginError: The metric answered with something that is no number >= 0.
        """
        start = CandidateState.start(inputs)
        states = [_State(trial, start) for trial in trials]
        walks = _first_ones_first(states, start)
        with torch.no_grad():
            for block in self.layout.blocks:
                with self.walker.block(block, inputs.dtype) as module:
                    self._pass_block(block, module, inputs, walks, tick)
            if self._at_output:
                self._measure_output(inputs, states)
        return [self._outcome(s) for s in states]

    def _pass_block(
        self,
        block: Block,
        module: nn.Module,
        inputs: Inputs,
        states: list[_State],
        tick: Tick,
    ) -> None:
        """Take every candidate through one block; what two have in common runs once.

        `module` is the block in the dtype of the search; its own weights are what is pruned.

        Candidates that come from the same state share the dense run (all of them in the first
        block), and those that also prune the block alike share everything. Those with a first
        one have its weights where they prune the block as it does.
        """
        scores = ScoreCache()
        waiting = Counter(id(s.state) for s in states if not s.dropped)
        dense: dict[int, BlockRun] = {}
        known: dict[tuple[Any, ...], _Step] = {}
        kept: dict[int, tuple[int, tuple[Any, ...], Mapping[str, Tensor] | None]] = {}
        for s in states:
            if s.ticks:
                tick()
            if s.dropped:
                continue
            before = self.walker.block_runs
            # A state before the block is told by its address, which is its own as long as any
            # candidate waits at it; none behind the block is ever looked up.
            state = id(s.state)
            own = _key(block, s.trial.targets)
            same, alike, weights = kept.get(id(s.first), (state, own, None))
            if same == state or alike != own:
                weights = None
            key = (state, weights is not None and id(s.first), *own)
            if key not in known:
                # Scores that no other candidate can use, or that memory is short for, are let go.
                reads = bool(self.pruner.pruner.required_statistics())
                scores.keep = not self.walker.streams and (waiting[state] > 1 or not reads)
                known[key] = self._step(block, module, inputs, s, dense, scores, weights)
            step = known[key]
            if s.leads:
                kept[id(s)] = state, own, step.weights
            waiting[state] -= 1
            if not waiting[state]:
                dense.pop(state, None)  # Gram matrices and kept inputs are large
            s.state = step.state
            s.total = s.total + step.misalignment
            s.deviation |= step.deviation
            s.runs += self.walker.block_runs - before
            limit = s.trial.limit
            s.dropped = limit is not None and float(s.total) > limit
        self.pruner.check_scores(scores)

    def _step(
        self,
        block: Block,
        module: nn.Module,
        inputs: Inputs,
        s: _State,
        known: dict[int, BlockRun],
        scores: ScoreCache,
        kept: Mapping[str, Tensor] | None,
    ) -> _Step:
        """Run one candidate's block, dense for the statistics and pruned for what follows.

        Where its pruned weights are kept from another candidate, the pruner reads no statistics.
        """
        last = block.index == len(self.layout.blocks) - 1
        output = not last or self._at_output
        if not any(
            t.counts.any() for t in (s.trial.targets.get(x.name) for x in block.linears) if t
        ):
            after = self.walker.run(block, module, inputs, s.state) if output else None
            zeros = {x.name: torch.zeros(x.in_features) for x in block.linears}
            state = after.state if after is not None else None
            return _Step(state or s.state, 0.0, zeros if self.deviation else {})
        dense = known.get(id(s.state))
        wanted = self._dense_statistics if kept is None else self._compared_statistics
        if dense is None and wanted:
            dense = self.walker.run(
                block, module, inputs, s.state, wanted,
                output=False, keep_inputs=self._compares,
            )  # fmt: skip
            if kept is None:
                known[id(s.state)] = dense
        if not output and not self._pruned_statistics:
            return _Step(s.state, 0.0, {})
        if kept is None:
            statistics = dense.statistics if dense is not None else {}
            own = self.walker.module(block)
            overlay = self.pruner.prune_block(block, own, statistics, s.trial.targets, scores)
            if inputs.dtype is not None:
                overlay = {name: weight.to(inputs.dtype) for name, weight in overlay.items()}
        else:
            overlay = dict(kept)
        after = self.walker.run(
            block, module, inputs, s.state,
            self._pruned_statistics if kept is None else self._compared_statistics,
            weights=overlay, output=output, dense=dense,
        )  # fmt: skip
        deviates = self.deviation and kept is None
        misalignment, deviation = (
            self._compare(block, dense, after, deviates) if dense else (0.0, {})
        )
        weights = overlay if s.leads else None
        return _Step(after.state or s.state, misalignment, deviation, weights)

    def _compare(
        self, block: Block, dense: BlockRun, after: BlockRun, deviates: bool
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        total: Tensor | float = 0.0
        deviation = {}
        for x in block.linears:
            if not self._at_output and self._is_comparable(x, dense, after):
                value = self.metric.call(
                    "measure_linear",
                    dense=dense.statistics[x.name], pruned=after.statistics[x.name], linear=x,
                )  # fmt: skip
                total = total + self._number(value, "measure_linear")
            if deviates:
                a, b = dense.statistics[x.name], after.statistics[x.name]
                deviation[x.name] = a.input_norm - b.input_norm
        return total, deviation

    def _is_comparable(self, linear: Linear, dense: BlockRun, after: BlockRun) -> bool:
        """Return whether a metric can compare a linear's inputs.

        A token that is routed to an expert may have no counterpart, and an expert may see none.
        """
        if linear.expert is None:
            return True
        seen = dense.statistics[linear.name].tokens and after.statistics[linear.name].tokens
        return bool(seen) and not self._compares

    def _measure_output(self, inputs: Inputs, states: list[_State]) -> None:
        """Average the output metric over windows; the reference is the dense walk's output."""
        reference = self._dense_output_of(inputs)
        for i, ids in enumerate(inputs.batches):
            dense = self.walker.logits(ids, reference[i])
            share = ids.shape[0] / inputs.windows
            for s in states:
                pruned = self.walker.logits(ids, s.state.outputs[i], s.state.weights)
                value = self.metric.call("measure_output", dense_logits=dense, pruned_logits=pruned)
                s.total = s.total + self._number(value, "measure_output") * share

    def _dense_output_of(self, inputs: Inputs) -> Store[BlockOutputs]:
        if inputs.windows not in self._dense_output:
            state = CandidateState.start(inputs)
            for block in self.layout.blocks:
                with self.walker.block(block, inputs.dtype) as module:
                    state = self.walker.run(block, module, inputs, state).state or state
            self._dense_output[inputs.windows] = state.outputs
        return self._dense_output[inputs.windows]

    def _number(self, value: object, hook: str) -> Tensor:
        if isinstance(value, Tensor) and value.dim() == 0:
            # Nothing waits for the device here: what is below 0 becomes NaN and is seen at the end.
            return value.double().where(value >= 0, torch.nan)
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise self.metric.error(hook, f"returned {what}, not a 0-d tensor")

    def _outcome(self, s: _State) -> Outcome:
        total = float(s.total)
        if not 0 <= total < float("inf"):
            hook = "measure_output" if self._at_output else "measure_linear"
            raise self.metric.error(hook, "returned NaN, infinity or a number below 0")
        deviation = {} if s.first is not None else s.deviation
        return Outcome(Measurement(total, s.dropped, s.runs), deviation)


def _first_ones_first(states: list[_State], start: CandidateState) -> list[_State]:
    """Tell states whose weights they reuse, and return those they reuse before them.

    A first one that is not among the trials (another process measures it) walks too, uncounted.
    """
    firsts = {id(s.trial.first): s for s in states if s.trial.first is s.trial.targets}
    for s in states:
        targets = s.trial.first
        if targets is not None and id(targets) not in firsts:
            firsts[id(targets)] = _State(Trial(targets), start, ticks=False)
    for first in firsts.values():
        first.leads = True
    others = [s for s in states if not s.leads]
    for s in others:
        s.first = firsts.get(id(s.trial.first))
    return [*firsts.values(), *others]


def _key(block: Block, targets: Mapping[str, Target]) -> tuple[Any, ...]:
    """Return what tells two candidates' targets for a block apart."""
    own = [(x.name, targets[x.name]) for x in block.linears if x.name in targets]
    return tuple(
        (
            name,
            t.ratio,
            str(t.pattern),
            t.comparison,
            t.prune_last,
            _bits(t.counts),
            _bits(t.importance.rows if t.importance else None),
            _bits(t.importance.inputs if t.importance else None),
        )
        for name, t in own
    )


def _bits(values: Tensor | None) -> bytes:
    return b"" if values is None else values.numpy().tobytes()
