"""NeuroAL: ask plugins for proposals, measure them side by side, keep the best-aligned one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from neuroal.distributed import ALONE, Team
from neuroal.errors import NeuroalError
from neuroal.layout import Layout
from neuroal.plugins import Plugin
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.hooks import rng_for
from neuroal.pruning.targets import Rules, targets
from neuroal.search.alignment import Aligner
from neuroal.search.outcomes import Outcome, Trial, pack, unpack
from neuroal.search.strategy import Contender, Strategy, digest
from neuroal.types import Proposal, RowRatiosTraits, Tick
from neuroal.walk import Inputs
from neuroal.walk.bookmark import Bookmark

Progress = Callable[[str, int], Tick]


@dataclass(frozen=True)
class Candidate:
    """One measured (or returned) proposal, as the report lists it."""

    role: str
    plugin: str
    parameters: Mapping[str, Any]
    misalignment: float | None
    selected: bool = False
    dropped: bool = False
    probe: bool = False
    windows: int | None = None


@dataclass(frozen=True, eq=False)
class Decision:
    """What a step decided: the allocation, and the winner's deviation, from its own measurement."""

    allocation: Allocation
    deviation: Mapping[str, Tensor]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class TopUpSearch:
    """Everything the two steps share.

    Attributes:
        aligner: Measures candidates; None without calibration data.
        layout: The model's linears.
        rules: Budget, comparison, pattern.
        inputs: Returns the first n search windows.
        windows: All search windows.
        journal: Earlier outcomes to replay and new ones to keep: `(key, make) -> bytes`.
        progress: Opens a progress bar: `(title, total) -> tick`.
        bookmark: Keeps how far the candidates of a key have come.
        seed: The recipe's seed.
        weighs_inputs: Whether importance of inputs has a meaning: the pruner only scores.
        team: The processes that share the candidates.
    """

    aligner: Aligner | None
    layout: Layout
    rules: Rules
    inputs: Callable[[int], Inputs]
    windows: int
    journal: Callable[[str, Callable[[], bytes]], bytes]
    progress: Progress
    seed: int
    bookmark: Callable[[str], Bookmark] = lambda key: Bookmark()
    weighs_inputs: bool = True
    team: Team = ALONE

    @cached_property
    def pruned(self) -> Layout:
        """Return the layout of the linears that are pruned, which block strategies see."""
        return self.layout.without(self.rules.dense) if self.rules.dense else self.layout

    def choose_blocks(
        self,
        plugins: Sequence[Plugin],
        measurements: Mapping[Plugin, Sequence[Mapping[str, Tensor]]],
        needs_deviation: bool,
    ) -> Decision:
        """Run the block step: each plugin is sent the misalignment of its own proposals.

        `measurements` are the answers of `measure_block` of the plugins that have it. With
        `needs_deviation` the winner is measured even where nothing competes.
        """
        strategies = [
            Strategy(
                p,
                p.proposals(
                    "propose_block_ratios",
                    layout=self.pruned,
                    sparsity=self.rules.ratio(self.layout),
                    measurements=measurements.get(p, ()),
                    windows=self.windows,
                    rng=rng_for(self.seed, p.role, p.name),
                ),
            )
            for p in plugins
        ]
        return self._choose("block_ratios", strategies, needs_deviation)

    def choose_rows(
        self, plugin: Plugin, block: Decision, measurements: Sequence[Mapping[str, Tensor]] = ()
    ) -> Decision:
        """Run the row step on what the block step decided.

        `measurements` are the answers of the plugin's `measure_block`, if it has one.
        """
        proposals = plugin.proposals(
            "propose_row_ratios",
            layout=self.layout,
            base=dict(block.allocation.ratios),
            deviation=block.deviation if "input_norm" in plugin.statistic_names() else {},
            measurements=measurements,
            weighs_inputs=self.weighs_inputs,
            windows=self.windows,
            rng=rng_for(self.seed, plugin.role, plugin.name),
        )
        return self._choose("row_ratios", [Strategy(plugin, proposals)], False)

    def _choose(self, step: str, strategies: list[Strategy], needs_deviation: bool) -> Decision:
        self._run_to_the_end(step, strategies)
        finalists = [self._finalist(s) for s in strategies]
        if len(finalists) > 1:
            for k, finalist in enumerate(finalists):
                if not finalist.can_win or finalist.windows != self.windows:
                    self._measure_whole(f"{step}-final-{k}", finalist)
        winner = min(finalists, key=lambda c: c.cost)  # the first in order on ties
        if needs_deviation and (winner.windows != self.windows or not winner.deviation):
            self._measure_whole(f"{step}-winner", winner)
        candidates = []
        for s, finalist in zip(strategies, finalists, strict=True):
            listed = s.contenders if finalist in s.contenders else [*s.contenders, finalist]
            candidates += [_candidate(c, step, selected=c is winner) for c in listed]
        return Decision(winner.allocation, winner.deviation, tuple(candidates))

    def _run_to_the_end(self, step: str, strategies: list[Strategy]) -> None:
        """Advance strategies side by side; those on equally many windows are measured together."""
        active = [s for s in strategies if s.advance()]
        round_number = 0
        while active:
            generations = [self._generation(s) for s in active]
            by_windows: dict[int, list[Contender]] = {}
            for contenders in generations:
                by_windows.setdefault(contenders[0].windows, []).extend(contenders)
            for windows, contenders in by_windows.items():
                self._measure(f"{step}-{round_number}-{windows}", contenders)
            for s, contenders in zip(active, generations, strict=True):
                s.hear(contenders)
            active = [s for s in active if s.advance()]
            round_number += 1

    def _generation(self, s: Strategy) -> list[Contender]:
        """Return what a strategy proposes now, checked."""
        generation = s.generation
        assert generation is not None
        windows = min(generation.windows or self.windows, self.windows)
        contenders = [self._contender(p, s.plugin, windows) for p in generation.proposals]
        limit = s.best(windows) if generation.drop_early and not generation.probe else None
        for contender in contenders:
            contender.probe, contender.limit = generation.probe, limit
            contender.first = contenders[0] if generation.reuse_first_weights else None
        return contenders

    def _contender(self, proposal: Proposal, plugin: Plugin, windows: int) -> Contender:
        try:
            if not isinstance(proposal.importance, Mapping):
                kind = type(proposal.importance).__name__
                raise NeuroalError(f"importance is {kind}, not a mapping")
            allocation = self._allocation(proposal)
            self._check_rows(allocation, plugin)
            json.dumps(dict(proposal.parameters), sort_keys=True)
        except Exception as error:
            raise plugin.error(plugin.proposes, f"proposed: {error}") from error
        return Contender(plugin, proposal, allocation, windows)

    def _allocation(self, proposal: Proposal) -> Allocation:
        """Return what a proposal asks for, checked; linears that stay dense have the ratio 0."""
        dense = self.rules.dense
        ratios = {**proposal.ratios, **dict.fromkeys(dense, 0.0)}
        importance = {n: x for n, x in proposal.importance.items() if n not in dense}
        return Allocation.of(ratios, self.layout, importance)

    def _check_rows(self, allocation: Allocation, plugin: Plugin) -> None:
        """Refuse ratios or importance of rows that the plugin's traits or the pruner rule out."""
        of_rows = plugin.role == "row_ratios"
        weighs_rows = of_rows and plugin.traits(RowRatiosTraits).weighs_rows
        if allocation.rows and weighs_rows:
            raise NeuroalError("ratios of rows, though describe says weighs_rows=True")
        if allocation.importance and not weighs_rows:
            raise NeuroalError(
                "importance is for role row_ratios, where describe says weighs_rows=True"
            )
        weighs_inputs = any(x.inputs is not None for x in allocation.importance.values())
        if weighs_inputs and not self.weighs_inputs:
            raise NeuroalError(
                "importance of inputs under a pruner that moves weights: give it only where "
                "weighs_inputs is True"
            )

    def _measure_whole(self, key: str, contender: Contender) -> None:
        """Measure one contender on all windows, without dropping it."""
        contender.windows, contender.limit = self.windows, None
        self._measure(key, [contender])

    def _measure(self, key: str, contenders: Sequence[Contender]) -> None:
        """Set the outcomes of contenders on equally many windows; the journal may have them."""
        sha256 = hashlib.sha256(key.encode())
        for contender in contenders:
            sha256.update(digest(contender.proposal, contender.probe))
            if contender.first:
                sha256.update(digest(contender.first.proposal, contender.first.probe))
        key = f"{key}-{sha256.hexdigest()[:16]}"
        mark = self.bookmark(key)
        packed = self.journal(key, lambda: self._walk(contenders, mark))
        mark.remove()
        for contender, outcome in zip(contenders, unpack(packed), strict=True):
            contender.outcome = outcome

    def _walk(self, contenders: Sequence[Contender], mark: Bookmark) -> bytes:
        """Measure contenders, shared out among the processes; return all outcomes, packed."""
        mine = self.team.mine(contenders)
        role = contenders[0].plugin.role.replace("_", " ")
        tick = self.progress(
            f"{role}: {len(contenders)} candidates", len(mine) * len(self.layout.blocks)
        )
        walking = {*mine, *(c.first for c in mine if c.first)}
        wanted = {c: targets(c.allocation, self.layout, self.rules, c.probe) for c in walking}
        trials = [Trial(wanted[c], c.limit, wanted[c.first] if c.first else None) for c in mine]
        assert self.aligner is not None, "a search needs windows"
        outcomes = []
        if trials:
            outcomes = self.aligner.measure(trials, self.inputs(mine[0].windows), tick, mark)
        # Deviations are most of what is sent between processes.
        outcomes = _trimmed(outcomes, mine)
        if self.team.size > 1:
            shares = [unpack(data) for data in self.team.exchange(pack(outcomes))]
            outcomes = _trimmed(self.team.interleaved(shares), contenders)
        return pack(outcomes)

    def _finalist(self, s: Strategy) -> Contender:
        """Return the strategy's winner: what it returned, else the least misaligned."""
        able = [c for c in s.contenders if c.can_win]
        if s.returned is not None:
            returned = self._contender(s.returned, s.plugin, self.windows)
            wanted = digest(s.returned)
            same = [c for c in able if digest(c.proposal) == wanted]
            return max(same, key=lambda c: c.windows, default=returned)
        if not able:
            raise s.plugin.error(s.plugin.proposes, "ended without a proposal that can win")
        most = max(c.windows for c in able)
        return min((c for c in able if c.windows == most), key=lambda c: c.cost)


def _trimmed(outcomes: Sequence[Outcome], contenders: Sequence[Contender]) -> list[Outcome]:
    """Keep the deviation of the least misaligned only: another one is rarely needed."""
    pairs = zip(outcomes, contenders, strict=True)
    able = [o for o, c in pairs if not (c.probe or o.measurement.dropped)]
    best = min(able, key=lambda o: o.measurement.misalignment, default=None)
    return [o if o is best else Outcome(o.measurement, {}) for o in outcomes]


def _candidate(contender: Contender, role: str, selected: bool) -> Candidate:
    measurement = None if contender.outcome is None else contender.outcome.measurement
    return Candidate(
        role=role,
        plugin=contender.plugin.name,
        parameters=dict(contender.proposal.parameters),
        misalignment=None if measurement is None else measurement.misalignment,
        selected=selected,
        dropped=measurement is not None and measurement.dropped,
        probe=contender.probe,
        windows=None if measurement is None else contender.windows,
    )
