"""EvoPress: an evolutionary search over one ratio per linear."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from neuroal import Generation, Layout, Measurement, Proposal, hookimpl, option
from neuroal_plugins.density import HIGHEST

Levels = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Evolution:
    """(1 + n) evolution of the linears' ratios by swaps of equally many weights (EvoPress).

    Sieberling et al. 2024, arXiv:2410.14649, algorithm 1. Every linear stands at a level around
    the uniform ratio; one level is the same number of weights in every linear, so that one linear
    up and another down leave the sparsity as it is. An offspring differs from its parent by
    min(r1, r2) such swaps, r1 and r2 drawn from 1..3. Offspring are measured in stages on more and
    more windows; the best of the last stage replaces the parent unless it is worse.

    The paper's cost is `output_kl`; any alignment metric will do.
    """

    generations: int = option(400, "generations at most")
    offspring: int = option(64, "offspring of one generation")
    windows: tuple[int, ...] = option(
        (1, 4), "search windows of each stage but the last, which uses all"
    )
    survivors: tuple[int, ...] = option((8, 2), "offspring that pass each stage but the last")
    step: float = option(0.05, "change of ratio that one level means in the smallest linear")
    block_runs: int | None = option(
        None, "block runs at most, the metric's dense reference counted; uniform ratios always run"
    )

    def __post_init__(self) -> None:
        for name in ("generations", "offspring", "block_runs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not a positive number")
        if len(self.windows) != len(self.survivors):
            raise ValueError(
                f"windows={self.windows} and survivors={self.survivors} are not equally long"
            )
        if min(self.windows + self.survivors, default=1) < 1:
            raise ValueError("windows and survivors must be positive")
        if not 0 < self.step < 1:
            raise ValueError(f"step={self.step} is outside (0, 1)")

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float, rng: torch.Generator
    ) -> Generator[Generation, list[Measurement], Proposal | None]:
        """Yield a generation per stage; the best-aligned on all windows wins."""
        space = Space.around(layout, sparsity, self.step)
        parent = space.start
        (heard,) = yield Generation([space.proposal(parent, 0, 0)])
        least = math.inf if heard.dropped else heard.misalignment
        budget = Budget(self.block_runs, heard.block_runs, len(layout.blocks))
        for generation in range(1, self.generations + 1):
            pool = list(enumerate(space.offspring(parent, self.offspring, rng)))
            for windows, keep in (*zip(self.windows, self.survivors, strict=True), (None, 1)):
                pool = pool[: budget.affordable(windows)]
                if not pool:
                    return None
                proposals = [space.proposal(levels, generation, i) for i, levels in pool]
                one = min(keep, len(pool)) == 1
                costs = yield Generation(proposals, drop_early=one, windows=windows)
                budget.spend(windows, costs)
                order = sorted(range(len(pool)), key=lambda i: _rank(costs[i]))
                pool = [pool[i] for i in order[:keep]]
            winner = costs[order[0]]
            if not winner.dropped and winner.misalignment <= least:
                parent, least = pool[0][1], winner.misalignment
        return None


def _rank(cost: Measurement) -> tuple[bool, float]:
    return cost.dropped, cost.misalignment


@dataclass(frozen=True)
class Space:
    """The levels that the linears can take, and the ratios that they mean.

    Attributes:
        names: Every linear, in order.
        sparsity: The ratio of level 0.
        steps: What one level adds to the ratio of each linear.
        lowest: Lowest level of each linear: its ratio is not below 0.
        highest: Highest level of each linear: its ratio is not above 0.99.
    """

    names: tuple[str, ...]
    sparsity: float
    steps: tuple[float, ...]
    lowest: Levels
    highest: Levels

    @classmethod
    def around(cls, layout: Layout, sparsity: float, step: float) -> Space:
        """Return the space whose levels are `step` of the smallest linear's weights apart."""
        sizes = [linear.weights for linear in layout.linears.values()]
        steps = tuple(step * min(sizes) / size for size in sizes)
        room = max(HIGHEST - sparsity, 0.0)
        return cls(
            tuple(layout.linears),
            sparsity,
            steps,
            tuple(-math.floor(sparsity / s + 1e-9) for s in steps),
            tuple(math.floor(room / s + 1e-9) for s in steps),
        )

    @property
    def start(self) -> Levels:
        """Return the uniform allocation."""
        return (0,) * len(self.names)

    def proposal(self, levels: Levels, generation: int, offspring: int) -> Proposal:
        """Return the ratios of `levels`."""
        ratios = {
            name: max(self.sparsity + level * step, 0.0)
            for name, level, step in zip(self.names, levels, self.steps, strict=True)
        }
        return Proposal(ratios, {"generation": generation, "offspring": offspring})

    def offspring(self, parent: Levels, count: int, rng: torch.Generator) -> list[Levels]:
        """Return up to `count` different offspring, none of them the parent; fewer if rare."""
        found: dict[Levels, None] = {}
        for _ in range(4 * count):
            child = self.mutate(parent, rng)
            if child != parent:
                found[child] = None
            if len(found) == count:
                break
        return list(found)

    def mutate(self, parent: Levels, rng: torch.Generator) -> Levels:
        """Return `parent` after min(r1, r2) swaps, fewer where no swap is left."""
        levels = list(parent)
        swaps = int(torch.randint(1, 4, (2,), generator=rng).min())
        for _ in range(swaps):
            for i, j in self._swap(levels, rng):
                levels[i] += 1
                levels[j] -= 1
        return tuple(levels)

    def _swap(self, levels: Sequence[int], rng: torch.Generator) -> Iterator[tuple[int, int]]:
        """Yield one linear to go up and another to go down, or nothing."""
        ups = [i for i, level in enumerate(levels) if level < self.highest[i]]
        if not ups:
            return
        i = _draw(ups, rng)
        downs = [j for j, level in enumerate(levels) if level > self.lowest[j] and j != i]
        if downs:
            yield i, _draw(downs, rng)


def _draw(choices: Sequence[int], rng: torch.Generator) -> int:
    return choices[int(torch.randint(len(choices), (), generator=rng))]


class Budget:
    """Block runs that are left, and what one candidate costs on so many windows."""

    def __init__(self, block_runs: int | None, price: int, blocks: int) -> None:
        """Start after one candidate was measured on all windows for `price`.

        The dense reference of a metric is counted once for every number of windows, needed or not;
        on all windows it costs one run of every block, and `price` at most.
        """
        self._left = math.inf if block_runs is None else block_runs - 2 * price
        self._blocks = blocks
        self._highest = price
        self._prices: dict[int | None, int] = {}

    def affordable(self, windows: int | None) -> int | None:
        """Return how many candidates still fit on so many windows; None for any number."""
        if math.isinf(self._left):
            return None
        left = max(self._left - self._reference(windows), 0)
        return int(left // max(self._prices.get(windows, self._highest), 1))

    def spend(self, windows: int | None, costs: Sequence[Measurement]) -> None:
        """Subtract what was measured; the price of a candidate is the highest heard so far."""
        self._left -= sum(cost.block_runs for cost in costs) + self._reference(windows)
        highest = max(cost.block_runs for cost in costs)
        self._prices[windows] = max(self._prices.get(windows, 0), highest)

    def _reference(self, windows: int | None) -> int:
        return 0 if windows is None or windows in self._prices else self._blocks * windows
