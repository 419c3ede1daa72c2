"""The linear schedule with its slope searched between the points of a grid."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

from neuroal import BlockRatiosTraits, Generation, Layout, Measurement, Proposal, hookimpl, option
from neuroal_plugins import density
from neuroal_plugins.block_ratios.linear_schedule import schedule

GOLDEN = (3 - math.sqrt(5)) / 2  # 0.382


@dataclass(frozen=True, eq=False)
class LambdaSearch:
    """ratio_b = S - lam + 2 lam b / (L - 1), lam by a coarse grid and golden section (Kiefer 1953).

    The grid's best point and its two neighbours bracket the minimum; every further point divides
    the wider side of the bracket. The defaults take 14 candidates, the number of the paper's grid.
    """

    lambdas: tuple[float, ...] = option(
        (0.0, 0.05, 0.1, 0.15, 0.2, 0.25), "the bracketing grid, rising; always measured whole"
    )
    refinements: int = option(8, "points of the golden section")
    block_runs: int | None = option(
        None, "no further point once grid and points would cost more block runs than this"
    )

    def __post_init__(self) -> None:
        density.check_lambdas(self.lambdas)
        if len(self.lambdas) < 2 or sorted(set(self.lambdas)) != list(self.lambdas):
            raise ValueError(f"lambdas={self.lambdas} are not two or more rising numbers")
        if self.refinements < 0:
            raise ValueError(f"refinements={self.refinements} is negative")
        if self.block_runs is not None and self.block_runs < 1:
            raise ValueError(f"block_runs={self.block_runs} is not a positive number")

    @hookimpl
    def describe(self) -> BlockRatiosTraits:
        """Return the number of points of grid and golden section."""
        return BlockRatiosTraits(len(self.lambdas) + self.refinements)

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float
    ) -> Generator[Generation, list[Measurement], Proposal | None]:
        """Propose the grid, then one point at a time; the best-aligned of all wins."""
        measured = yield Generation([schedule(layout, lam, sparsity) for lam in self.lambdas])
        costs = [math.inf if m.dropped else m.misalignment for m in measured]
        best = costs.index(min(costs))
        around = (max(best - 1, 0), best, min(best + 1, len(self.lambdas) - 1))
        low, middle, high = (self.lambdas[i] for i in around)
        least = costs[best]
        spent, price = sum(m.block_runs for m in measured), max(m.block_runs for m in measured)
        for _ in range(self.refinements):
            if self.block_runs is not None and spent + price > self.block_runs:
                return None
            lam = divide(low, middle, high)
            (point,) = yield Generation([schedule(layout, lam, sparsity)])
            spent, price = spent + point.block_runs, max(price, point.block_runs)
            better = not point.dropped and point.misalignment < least
            low, middle, high = narrow((low, middle, high), lam, better)
            least = point.misalignment if better else least
        return None


def divide(low: float, middle: float, high: float) -> float:
    """Return the point that divides the wider side of the bracket, nearer to `middle`."""
    if high - middle > middle - low:
        return middle + GOLDEN * (high - middle)
    return middle - GOLDEN * (middle - low)


def narrow(
    bracket: tuple[float, float, float], lam: float, better: bool
) -> tuple[float, float, float]:
    """Return the narrower bracket after `lam` was better than its middle, or was not."""
    low, middle, high = bracket
    if better:
        return (middle, lam, high) if lam > middle else (low, lam, middle)
    return (low, middle, lam) if lam > middle else (lam, middle, high)
