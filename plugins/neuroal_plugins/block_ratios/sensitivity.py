"""Ratios per linear from measured sensitivities: the same marginal damage everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroal import (
    BlockRatiosTraits,
    Generation,
    Layout,
    Linear,
    Measurement,
    Proposal,
    hookimpl,
    option,
)
from neuroal_plugins.density import HIGHEST
from neuroal_plugins.run_budget import RunBudget

Ratios = Tensor  # float64 `(linears,)`
Measured = tuple[float, Ratios]  # misalignment on all search windows, and what it is of
SMALLEST_STEP, SMALLEST_PROBE = 0.002, 0.02


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Minimise the damage D(r) over one ratio per linear: dD/dr_l / n_l is the same for all l.

    Whatever the alignment metric measures is the damage; the presets take the divergence of the
    output. n_l is the number of weights of linear l, and sum n_l r_l = S N throughout.

    Start: D_l, the damage of a model in which linear l alone is pruned at S. Its growth is taken as
    D_l exp(b (r - S)), b the steepness; the sum over l is least where r_l = S - (log(D_l / n_l) -
    const) / b. Damages are not quite additive, so candidates go a fraction of that way.

    Rounds: m_l = (D(r + d e_l) - D(r)) / (d n_l) around the best allocation so far, and candidates
    r_l - step tanh((m_l - mu) / 2 median |m|), mu the median weight's m: pruning one linear changes
    what the others do. Marginals of earlier rounds are remembered, moved on by exp(b * change of
    r_l). A round without progress asks for smaller steps and for more windows in its probes; d
    follows the step once probes see all windows. Where single linears are too many for the budget,
    the linears of one part (attention, MLP) of a block are one unit, or those of a block.

    Uniform ratios are a candidate, measured on all windows like every other: no result is worse.
    Block runs, with L blocks, n windows and w windows for probes: a candidate 2 L n (half of it
    under a pruner without statistics), the start's probes about 1/2 L^2 w linears per block, those
    of a round twice that. The search stops before its budget is exceeded; the dense reference is
    counted.
    """

    candidates: float = option(
        29, "budget as a number of candidates of 2 L n block runs each; the paper's search has 29"
    )
    block_runs: int | None = option(None, "budget in block runs instead, in all")
    probe_windows: int = option(2, "search windows that probes are measured on, to begin with")
    probe: float = option(0.1, "change of one linear's ratio in a probe")
    steepness: float = option(9.0, "b: relative growth of a linear's damage with its ratio")
    start: float = option(0.5, "fraction of the start's predicted change that is tried first")
    step: float = option(0.1, "largest change of a ratio in the first round")
    memory: float = option(0.3, "weight of earlier rounds' marginals, in [0, 1)")

    def __post_init__(self) -> None:
        for name in ("candidates", "block_runs", "probe_windows", "probe", "steepness", "start"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} is not a positive number")
        for name in ("probe", "step", "memory"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1)")

    @hookimpl
    def describe(self) -> BlockRatiosTraits:
        """Return the budget, unless it is one in block runs: these depend on the model."""
        return BlockRatiosTraits(None if self.block_runs else self.candidates)

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float, windows: int
    ) -> Generator[Generation, list[Measurement], Proposal | None]:
        """Yield uniform, the start, and rounds until the budget ends; the best-aligned wins."""
        uniform = Proposal(dict.fromkeys(layout.linears, sparsity), {"at": "uniform"})
        if sparsity == 0 or len(layout.linears) < 2:
            return uniform
        (measured,) = yield Generation([uniform])
        blocks = len(layout.blocks)
        total = self.block_runs or int(self.candidates * 2 * blocks * windows)
        budget = RunBudget.with_reserve(total, blocks, windows, measured.block_runs)
        search = _RatioSearch(self, layout, sparsity, budget)
        if budget.fits(search.start_price, 1):
            best = yield from search.begin(_cost(measured))
            yield from search.rounds(best)
        return None


@dataclass(frozen=True)
class Unit:
    """Linears whose ratios change together.

    Attributes:
        name: In the parameters of proposals.
        members: Indices of its linears.
        block: Index of their block.
    """

    name: str
    members: tuple[int, ...]
    block: int


def units_within(layout: Layout, budget: RunBudget) -> tuple[Unit, ...]:
    """Return the finest units of which probes on one window cost half the budget at most.

    They are linears, parts of blocks (attention, MLP) or, whatever these cost, blocks.
    """
    levels: tuple[Callable[[Linear], str], ...] = (
        lambda x: x.name,
        lambda x: f"{layout.blocks[x.block].name}.{x.part}",
        lambda x: layout.blocks[x.block].name,
    )
    block_of = [x.block for x in layout.linears.values()]
    units: tuple[Unit, ...] = ()
    for level in levels:
        members: dict[str, list[int]] = {}
        for i, x in enumerate(layout.linears.values()):
            members.setdefault(level(x), []).append(i)
        units = tuple(Unit(name, tuple(m), block_of[m[0]]) for name, m in members.items())
        if 2 * budget.probes([unit.block for unit in units], 1) <= budget.left:
            break
    return units


class _RatioSearch:
    """The state that start and rounds share."""

    def __init__(
        self, options: Sensitivity, layout: Layout, sparsity: float, budget: RunBudget
    ) -> None:
        self.options = options
        self.names = tuple(layout.linears)
        self.sparsity = sparsity
        self.budget = budget
        self.units = units_within(layout, budget)
        self.changed = [unit.block for unit in self.units]
        sizes = torch.tensor([x.weights for x in layout.linears.values()], dtype=torch.float64)
        self.sizes = sizes / sizes.sum()  # (linears,)
        self.members = torch.zeros(len(self.units), len(sizes), dtype=torch.float64)
        for i, unit in enumerate(self.units):
            self.members[i, list(unit.members)] = 1
        self.share = self.members @ self.sizes  # (units,), of all weights
        self.windows = min(options.probe_windows, budget.windows)
        while self.windows > 1 and 2 * self.start_price > budget.left:
            self.windows -= 1
        self.marginals: Tensor | None = None  # (units,)

    @property
    def start_price(self) -> int:
        """Return the price of the start's probes, at most."""
        return self.budget.probes(self.changed, self.windows)

    def begin(self, uniform: float) -> Generator[Generation, list[Measurement], Measured]:
        """Prune every unit alone, and go towards the prediction from that."""
        probes = [
            self._proposal(self.members[i] * self.sparsity, {"only": unit.name})
            for i, unit in enumerate(self.units)
        ]
        damage = yield from self._probe(probes)
        # What cannot be seen is not harmless: a thousandth of the worst at least.
        damage = damage.clamp(min=max(float(damage.max()) / 1000, 1e-12))
        change = -(damage / self.share).log() / self.options.steepness
        change = change - (change * self.share).sum()
        best = uniform, torch.full_like(self.sizes, self.sparsity)
        best, _ = yield from self._line(best, change, self.options.start, {"at": "start"})
        return best

    def rounds(self, best: Measured) -> Generator[Generation, list[Measurement], None]:
        """Measure marginals around the best allocation and move against them, again and again."""
        step, number = self.options.step, 0
        while step > SMALLEST_STEP or self.windows < self.budget.windows:
            number += 1
            while self.windows > 1 and not self._affordable(2):
                self.windows -= 1
            if not self._affordable(1):
                break
            marginals = yield from self._measure(best[1], step, number)
            middle = _weighted_median(marginals, self.share)
            scale = 2 * marginals.abs().median().clamp(min=1e-12)
            change = -torch.tanh((marginals - middle) / scale)
            better, used = yield from self._line(best, change, step, {"round": number})
            if better[0] < best[0]:
                moved = (self.members @ (better[1] - best[1])) / self.members.sum(dim=1)
                self.marginals = marginals * (self.options.steepness * moved).exp()
                best, step = better, used
            else:
                self.marginals = None if self.windows < self.budget.windows else marginals
                self.windows = min(2 * self.windows, self.budget.windows)
                step = max(step / 3, SMALLEST_STEP)

    def _affordable(self, candidates: int) -> bool:
        probes = self.budget.probes(self.changed, self.windows, reuse=True)
        return self.budget.fits(probes, candidates)

    def _measure(
        self, at: Tensor, step: float, number: int
    ) -> Generator[Generation, list[Measurement], Tensor]:
        """Return the damage per weight of pruning a little more of every unit."""
        exact = self.windows == self.budget.windows  # no noise that a small change would drown in
        little = min(max(step, SMALLEST_PROBE), self.options.probe) if exact else self.options.probe
        room = ((1 - self.members @ at / self.members.sum(dim=1)) / 2).clamp(max=little)
        moves = self.members * room.unsqueeze(1)  # (units, linears)
        probes = [self._proposal(at, {"round": number, "at": "best"})]
        probes += [
            self._proposal((at + move).clamp(max=1), {"round": number, "more": u.name})
            for u, move in zip(self.units, moves, strict=True)
        ]
        damage = yield from self._probe(probes, reuse=True)
        marginals = (damage[1:] - damage[0]) / (room * self.share)
        if self.marginals is None:
            return marginals
        memory = self.options.memory
        return memory * self.marginals + (1 - memory) * marginals

    def _line(
        self, best: Measured, change: Tensor, step: float, parameters: dict[str, Any]
    ) -> Generator[Generation, list[Measurement], tuple[Measured, float]]:
        """Try 1 and 1/2 of `step` along a change, then 1/5 where both fail, or (in rounds) twice.

        Returns the best so far and the step that led to it, 0 if none did.
        """
        direction, at = change @ self.members, best[1]
        best, used = yield from self._steps(best, at, direction, (step, step / 2), parameters)
        if best[1] is at:
            best, used = yield from self._steps(best, at, direction, (step / 5,), parameters)
        elif used == step and "round" in parameters:
            further, twice = yield from self._steps(best, at, direction, (2 * step,), parameters)
            best, used = further, twice or used
        return best, used

    def _steps(
        self,
        best: Measured,
        at: Tensor,
        direction: Tensor,
        steps: Sequence[float],
        parameters: dict[str, Any],
    ) -> Generator[Generation, list[Measurement], tuple[Measured, float]]:
        """Measure as many of the steps as can be paid; 0 is returned where none is better."""
        used = 0.0
        steps = [step for k, step in enumerate(steps, 1) if self.budget.fits(0, k)]
        if not steps:
            return best, used
        tried = [self._projected(at + step * direction) for step in steps]
        proposals = [
            self._proposal(ratios, parameters | {"step": round(step, 6)})
            for ratios, step in zip(tried, steps, strict=True)
        ]
        measured = yield Generation(proposals, drop_early=len(proposals) == 1)
        self.budget.pay(measured)
        for ratios, cost, step in zip(tried, map(_cost, measured), steps, strict=True):
            if cost < best[0]:
                best, used = (cost, ratios), step
        return best, used

    def _probe(
        self, probes: list[Proposal], reuse: bool = False
    ) -> Generator[Generation, list[Measurement], Tensor]:
        """Return the damages; the weights of the first probe may be reused by the others."""
        measured = yield Generation(
            probes, windows=self.windows, probe=True, reuse_first_weights=reuse
        )
        self.budget.pay(measured, self.windows, self.changed if reuse else ())
        return torch.tensor([_cost(m) for m in measured], dtype=torch.float64)

    def _projected(self, ratios: Ratios) -> Ratios:
        """Return ratios shifted by one constant and clipped to [0, 0.99], of the wanted mean.

        The same as `neuroal.project` up to the last bits. They are kept as they are here, so that
        earlier runs repeat to the bit: a difference of 1e-16 may grow from round to round.
        """
        highest = max(HIGHEST, self.sparsity)
        low, high = -float(ratios.max()), highest - float(ratios.min())
        for _ in range(60):
            middle = (low + high) / 2
            reached = ((ratios + middle).clamp(0, highest) * self.sizes).sum()
            low, high = (middle, high) if reached < self.sparsity else (low, middle)
        return (ratios + high).clamp(0, highest)

    def _proposal(self, ratios: Ratios, parameters: dict[str, Any]) -> Proposal:
        return Proposal(dict(zip(self.names, ratios.tolist(), strict=True)), parameters)


def _cost(measurement: Measurement) -> float:
    return math.inf if measurement.dropped else measurement.misalignment


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    order = values.argsort()
    middle = torch.searchsorted(weights[order].cumsum(0), weights.sum() / 2)
    return values[order[min(int(middle), len(order) - 1)]]
