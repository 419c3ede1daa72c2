"""Allocations of one sparsity, and what measuring them costs: for searches within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroal import Layout, Linear, Measurement, Proposal
from neuroal_plugins.density import HIGHEST

Vector = Tensor  # float64, one entry per linear or per unit


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


def project(ratios: Vector, share: Vector, mean: float) -> Vector:
    """Return ratios shifted by one constant and clipped to [0, 0.99], of a weighted mean.

    Args:
        ratios: float64 `(n,)`.
        share: float64 `(n,)`, the weights, which sum to 1.
        mean: In [0, 1); above 0.99 it is the upper bound as well.
    """
    highest = max(HIGHEST, mean)
    low, high = -float(ratios.max()), highest - float(ratios.min())
    for _ in range(60):
        middle = (low + high) / 2
        reached = ((ratios + middle).clamp(0, highest) * share).sum()
        low, high = (middle, high) if reached < mean else (low, middle)
    return (ratios + high).clamp(0, highest)


class Space:
    """Allocations of one sparsity: ratios in [0, 0.99] of a given weighted mean."""

    def __init__(self, layout: Layout, sparsity: float) -> None:
        self.layout = layout
        self.sparsity = sparsity
        self.names = tuple(layout.linears)
        sizes = [linear.weights for linear in layout.linears.values()]
        self.share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        self.uniform = torch.full_like(self.share, sparsity)

    def project(self, ratios: Vector) -> Vector:
        """Return `ratios` shifted by one constant and clipped, of the wanted mean."""
        return project(ratios, self.share, self.sparsity)

    def proposal(self, ratios: Vector, parameters: dict[str, Any]) -> Proposal:
        """Return the proposal of one ratio per linear."""
        return Proposal(dict(zip(self.names, ratios.tolist(), strict=True)), parameters)

    def units(self, purse: RunBudget) -> tuple[Unit, ...]:
        """Return the finest units of which probes on one window cost half the budget at most."""
        levels: tuple[Callable[[Linear], str], ...] = (
            lambda x: x.name,
            lambda x: f"{self.layout.blocks[x.block].name}.{x.part}",
            lambda x: self.layout.blocks[x.block].name,
        )
        units: tuple[Unit, ...] = ()
        for level in levels:
            members: dict[str, list[int]] = {}
            for i, x in enumerate(self.layout.linears.values()):
                members.setdefault(level(x), []).append(i)
            blocks = [x.block for x in self.layout.linears.values()]
            units = tuple(Unit(k, tuple(v), blocks[v[0]]) for k, v in members.items())
            if 2 * purse.probes(units, 1) <= purse.left:
                break
        return units


class RunBudget:
    """Block runs that are left, and what things cost."""

    def __init__(self, budget: int, blocks: int, windows: int, candidate: int) -> None:
        """Start with the price of one candidate on all windows.

        One window of it is set aside: a search ends where it did when it measured one to begin
        with, to learn how many there are.
        """
        self.left = budget - candidate // windows - blocks
        self.windows = windows
        self.candidate = candidate
        self._blocks = blocks
        self._seen = {1}
        self._per_block = candidate / (blocks * windows)
        self._behind = self._per_block

    def pay(self, heard: Sequence[Measurement], windows: int, around: Sequence[Unit] = ()) -> None:
        """Subtract what was measured, and the dense reference of so many windows.

        Probes of units `around` a proposal show what a block behind a change costs: one run, or two
        where the metric compares it with its dense run.
        """
        runs = sum(m.block_runs for m in heard)
        self.left -= runs
        if around:
            behind = sum(self._blocks - unit.block for unit in around)
            changed = (runs / windows - self._per_block * self._blocks) / behind
            self._behind = max(math.ceil(changed - 1e-6), 1)
        if windows not in self._seen:
            self._seen.add(windows)
            self.left -= self._blocks * windows

    def probes(self, units: Sequence[Unit], windows: int, around: bool = False) -> int:
        """Return the price of one probe per unit that prunes all blocks, at most.

        What lies before the probe's block is run once for all of them. The first ones `around` a
        proposal count as others do; then it is known what they cost.
        """
        behind = sum(self._blocks - unit.block for unit in units)
        per_block = self._behind if around else self._per_block
        return math.ceil((self._per_block * self._blocks + per_block * behind) * windows)

    def fits(self, probes: int, candidates: int) -> bool:
        """Return whether probes at a price and so many candidates can be paid."""
        return probes + candidates * self.candidate <= self.left
