"""NeuroAL: ask plugins for proposals, measure them side by side, keep the best-aligned one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuroal.distributed import ALONE, Team
from neuroal.errors import NeuroalError
from neuroal.layout import Layout
from neuroal.plugins import Plugin
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.pruner import generator
from neuroal.pruning.targets import Rules, targets
from neuroal.search.alignment import Aligner
from neuroal.search.outcomes import Outcome, Trial, pack, unpack
from neuroal.types import (
    Generation,
    Measurement,
    Proposal,
    Proposals,
    RowRatiosTraits,
    Target,
    Tick,
)
from neuroal.walk.walker import Inputs

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
    """What a step decided: the allocation, and the deviation of its own evaluation."""

    allocation: Allocation
    deviation: Mapping[str, Tensor]
    candidates: tuple[Candidate, ...]


@dataclass(eq=False)
class _Contender:
    """A proposal on its way: what it asks for, and what was measured of it, on which windows."""

    proposal: Proposal
    probe: bool
    allocation: Allocation
    outcome: Outcome | None
    windows: int
    plugin: Plugin
    first: _Contender | None = None  # whose weights it has where it prunes alike

    @property
    def cost(self) -> float:
        return float("inf") if self.outcome is None else self.outcome.measurement.misalignment


@dataclass(eq=False)
class _Strategy:
    """One plugin's generator, what it proposed so far, and what it returned."""

    plugin: Plugin
    proposals: Proposals
    tried: list[_Contender] = field(default_factory=list)
    generation: Generation | None = None
    answer: list[Measurement] | None = None
    returned: Proposal | None = None

    def advance(self) -> bool:
        """Ask for the next generation; False when the strategy has ended."""
        try:
            if self.answer is None:
                self.generation = next(self.proposals)
            else:
                self.generation = self.proposals.send(self.answer)
        except StopIteration as stop:
            self.generation, self.returned = None, stop.value
            return False
        return True

    def best(self, windows: int) -> float | None:
        """Return the least finished misalignment on so many windows."""
        done = [t.cost for t in self.tried if t.windows == windows and _can_win(t)]
        return min(done, default=None)


def _can_win(tried: _Contender) -> bool:
    measured = tried.outcome is not None and not tried.outcome.measurement.dropped
    return measured and not tried.probe


@dataclass(frozen=True)
class TopUpSearch:
    """Everything the two steps share.

    Attributes:
        aligner: Measures candidates; None without calibration data.
        layout: The model's linears.
        rules: Budget, comparison, pattern.
        inputs: Search windows, cut to the first n.
        windows: All search windows.
        journal: Earlier outcomes to replay and new ones to keep: `(key, make) -> bytes`.
        progress: Opens a progress bar: `(title, total) -> tick`.
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
    weighs_inputs: bool = True
    team: Team = ALONE

    def choose_blocks(
        self,
        plugins: Sequence[Plugin],
        measurements: Mapping[Plugin, Sequence[Mapping[str, Tensor]]],
        needs_deviation: bool,
    ) -> Decision:
        """Run the block step: every plugin hears its own costs, the best-aligned proposal wins.

        Args:
            plugins: Of role `block_ratios`.
            measurements: Answers of `measure_block` of the plugins that have it.
            needs_deviation: Measure the winner even where nothing competes.
        """
        strategies = [
            _Strategy(
                p,
                p.proposals(
                    "propose_block_ratios",
                    layout=self.layout,
                    sparsity=self.rules.sparsity,
                    measurements=measurements.get(p, ()),
                    windows=self.windows,
                    rng=generator(self.seed, p.role, p.name),
                ),
            )
            for p in plugins
        ]
        return self._choose("block_ratios", strategies, needs_deviation)

    def choose_rows(
        self, plugin: Plugin, block: Decision, measurements: Sequence[Mapping[str, Tensor]] = ()
    ) -> Decision:
        """Run the row step on the block step's allocation.

        Args:
            plugin: Of role `row_ratios`.
            block: What the block step decided.
            measurements: Answers of its `measure_block`, if it has one.
        """
        proposals = plugin.proposals(
            "propose_row_ratios",
            layout=self.layout,
            base=dict(block.allocation.ratios),
            deviation=block.deviation if "input_norm" in plugin.statistic_names() else {},
            measurements=measurements,
            weighs_inputs=self.weighs_inputs,
            windows=self.windows,
            rng=generator(self.seed, plugin.role, plugin.name),
        )
        return self._choose("row_ratios", [_Strategy(plugin, proposals)], False)

    def _choose(self, step: str, strategies: list[_Strategy], needs_deviation: bool) -> Decision:
        self._advance_all(step, strategies)
        finalists = [self._finalist(s) for s in strategies]
        if len(finalists) > 1:
            for k, tried in enumerate(finalists):
                if not _can_win(tried) or tried.windows != self.windows:
                    self._measure(f"{step}-final-{k}", [(tried, None)], self.windows)
        winner = min(finalists, key=lambda t: t.cost)  # the first in order on ties
        if needs_deviation and (winner.windows != self.windows or not _deviation(winner)):
            self._measure(f"{step}-winner", [(winner, None)], self.windows)
        candidates = []
        for s, finalist in zip(strategies, finalists, strict=True):
            listed = s.tried if finalist in s.tried else [*s.tried, finalist]
            candidates += [_candidate(t, step, t is winner) for t in listed]
        return Decision(winner.allocation, _deviation(winner), tuple(candidates))

    def _advance_all(self, step: str, strategies: list[_Strategy]) -> None:
        active = [s for s in strategies if s.advance()]
        round_number = 0
        while active:
            by_windows: dict[int, list[tuple[_Contender, float | None]]] = {}
            asked: list[list[_Contender]] = []
            for s in active:
                assert s.generation is not None
                windows = min(s.generation.windows or self.windows, self.windows)
                probe = s.generation.probe
                limit = s.best(windows) if s.generation.drop_early and not probe else None
                tried = [self._tried(p, s.plugin, windows, probe) for p in s.generation.proposals]
                if s.generation.reuse_first_weights:
                    for t in tried:
                        t.first = tried[0]
                by_windows.setdefault(windows, []).extend((t, limit) for t in tried)
                asked.append(tried)
            for windows, trials in by_windows.items():
                self._measure(f"{step}-{round_number}-{windows}", trials, windows)
            for s, tried in zip(active, asked, strict=True):
                s.tried += tried
                s.answer = [t.outcome.measurement for t in tried if t.outcome is not None]
            active = [s for s in active if s.advance()]
            round_number += 1

    def _tried(
        self, proposal: Proposal, plugin: Plugin, windows: int, probe: bool = False
    ) -> _Contender:
        try:
            if not isinstance(proposal.importance, Mapping):
                kind = type(proposal.importance).__name__
                raise NeuroalError(f"importance is {kind}, not a mapping")
            allocation = Allocation.of(proposal.ratios, self.layout, proposal.importance)
            self._check_rows(allocation, plugin)
            json.dumps(dict(proposal.parameters), sort_keys=True)
        except Exception as error:
            raise plugin.error(plugin.proposes, f"proposed: {error}") from error
        return _Contender(proposal, probe, allocation, None, windows, plugin)

    def _check_rows(self, allocation: Allocation, plugin: Plugin) -> None:
        """Refuse ratios or importance of rows that the plugin's traits or the pruner rule out."""
        weighs_rows = plugin.traits(RowRatiosTraits).weighs_rows
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

    def _measure(
        self, key: str, trials: Sequence[tuple[_Contender, float | None]], windows: int
    ) -> None:
        def make() -> bytes:
            mine = self.team.mine(trials)
            tick = self.progress(title, len(mine) * len(self.layout.blocks))
            every = [t for t, _ in mine] + [t.first for t, _ in mine if t.first]
            made = {id(t): self._targets(t) for t in {id(t): t for t in every}.values()}
            wanted = [Trial(made[id(t)], limit, made.get(id(t.first))) for t, limit in mine]
            assert self.aligner is not None, "a search needs windows"
            outcomes = self.aligner.measure(wanted, self.inputs(windows), tick) if wanted else []
            # Candidates that begin alike share deviations, and these are the bulk of what is sent.
            outcomes = _trimmed(outcomes, [t.probe for t, _ in mine])
            if self.team.size > 1:
                shares = [unpack(data) for data in self.team.exchange(pack(outcomes))]
                outcomes = _trimmed(self.team.interleaved(shares), [t.probe for t, _ in trials])
            return pack(outcomes)

        title = f"{trials[0][0].plugin.role.replace('_', ' ')}: {len(trials)} candidates"
        digest = hashlib.sha256(key.encode())
        for t, _ in trials:
            digest.update(_digest(t.proposal, t.probe))
            if t.first:
                digest.update(_digest(t.first.proposal, probe=True))
        outcomes = unpack(self.journal(f"{key}-{digest.hexdigest()[:16]}", make))
        for (t, _), outcome in zip(trials, outcomes, strict=True):
            t.outcome, t.windows = outcome, windows

    def _targets(self, tried: _Contender) -> Mapping[str, Target]:
        return targets(tried.allocation, self.layout, self.rules, tried.probe)

    def _finalist(self, s: _Strategy) -> _Contender:
        """Return the strategy's winner: what it returned, else the least misaligned."""
        hook = s.plugin.proposes
        able = [t for t in s.tried if _can_win(t)]
        if s.returned is not None:
            returned = self._tried(s.returned, s.plugin, self.windows)
            wanted = _digest(s.returned)
            same = [t for t in able if _digest(t.proposal) == wanted]
            return max(same, key=lambda t: t.windows, default=returned)
        if not able:
            raise s.plugin.error(hook, "ended without a proposal that can win")
        most = max(t.windows for t in able)
        return min((t for t in able if t.windows == most), key=lambda t: t.cost)


def _deviation(tried: _Contender) -> Mapping[str, Tensor]:
    return {} if tried.outcome is None else tried.outcome.deviation


def _trimmed(outcomes: list[Outcome], probes: list[bool]) -> list[Outcome]:
    """Keep the deviation of the least misaligned only: rarely is another one asked for."""
    pairs = zip(outcomes, probes, strict=True)
    able = [o for o, probe in pairs if not (probe or o.measurement.dropped)]
    best = min(able, key=lambda o: o.measurement.misalignment, default=None)
    return [o if o is best else Outcome(o.measurement, {}) for o in outcomes]


def _candidate(tried: _Contender, role: str, selected: bool) -> Candidate:
    measurement = None if tried.outcome is None else tried.outcome.measurement
    return Candidate(
        role=role,
        plugin=tried.plugin.name,
        parameters=dict(tried.proposal.parameters),
        misalignment=None if measurement is None else measurement.misalignment,
        selected=selected,
        dropped=measurement is not None and measurement.dropped,
        probe=tried.probe,
        windows=None if measurement is None else tried.windows,
    )


def _digest(proposal: Proposal, probe: bool = False) -> bytes:
    digest = hashlib.sha256(json.dumps(dict(proposal.parameters), sort_keys=True).encode())
    digest.update(b"probe" if probe else b"")
    for name in sorted(proposal.ratios):
        digest.update(name.encode() + _bytes(proposal.ratios[name]))
    importance = sorted(proposal.importance.items(), key=lambda item: item[0])
    for name, given in importance:
        digest.update(name.encode() + _bytes(given.rows))
    for name, given in importance:
        if given.inputs is not None:
            digest.update(name.encode() + _bytes(given.inputs))
    return digest.digest()


def _bytes(values: float | Tensor) -> bytes:
    given = torch.as_tensor(values, dtype=torch.float64).detach().cpu().contiguous()
    return given.numpy().tobytes()
