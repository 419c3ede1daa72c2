"""Successive halving of random block ratios."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch

from neuroal import Generation, Layout, Measurement, Proposal, hookimpl, option


@dataclass(frozen=True, eq=False)
class SuccessiveHalving:
    """Random block ratios, of which the better half stays, on twice the windows.

    Jamieson and Talwalkar 2016, arXiv:1502.07943. The first candidate is uniform. Rounds are
    measured on 1, 2, 4, ... windows, the winner on all.
    """

    candidates: int = option(16, "candidates of the first round")
    spread: float = option(0.15, "largest distance of a block's ratio from the sparsity")

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates} is not a positive number")
        if not 0 < self.spread < 1:
            raise ValueError(f"spread={self.spread} is outside (0, 1)")

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float, rng: torch.Generator
    ) -> Generator[Generation, list[Measurement], Proposal]:
        """Halve the candidates until one is left, and return it."""
        pool = [draw(layout, sparsity, self.spread, k, rng) for k in range(self.candidates)]
        windows = 1
        while len(pool) > 1:
            half = math.ceil(len(pool) / 2)
            costs = yield Generation(pool, drop_early=half == 1, windows=windows)
            order = sorted(range(len(pool)), key=lambda k: _rank(costs[k]))
            pool = [pool[k] for k in order[:half]]
            windows *= 2
        yield Generation(pool)  # for the report: its misalignment on all windows
        return pool[0]


def _rank(cost: Measurement) -> tuple[bool, float]:
    return cost.dropped, cost.misalignment


def draw(
    layout: Layout, sparsity: float, spread: float, number: int, rng: torch.Generator
) -> Proposal:
    """Return a candidate whose mean ratio, weighted by weights, is the sparsity.

    Args:
        layout: Blocks and linears.
        sparsity: The mean.
        spread: Largest distance of a ratio from it, less where ratios would leave [0, 1].
        number: Of the candidate; 0 is uniform.
        rng: What the others are drawn from.
    """
    sizes = torch.tensor([block.weights for block in layout.blocks], dtype=torch.float64)
    shift = 2 * torch.rand(len(sizes), generator=rng, dtype=torch.float64) - 1
    shift = shift - (shift * sizes).sum() / sizes.sum()
    room = min(spread, sparsity, 1 - sparsity) if number else 0.0
    ratios = sparsity + room * shift / max(float(shift.abs().max()), 1.0)
    return Proposal(layout.per_block(ratios.tolist()), {"candidate": number})
