"""EvoPress: an evolutionary search over one ratio per linear."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from neuroal import Generation, Layout, Measurement, Proposal, hookimpl, option
from neuroal_plugins.density import HIGHEST
from neuroal_plugins.run_budget import RunBudget

Levels = tuple[int, ...]  # the level of every linear


@dataclass(frozen=True, eq=False)
class Evolution:
    """(1 + n) evolution of the linears' ratios by swaps of an equal number of weights (EvoPress).

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
        self, layout: Layout, sparsity: float, rng: torch.Generator, windows: int
    ) -> Generator[Generation, list[Measurement], Proposal | None]:
        """Yield a generation per stage; the best-aligned on all windows wins."""
        grid = LevelGrid.around(layout, sparsity, self.step)
        parent = grid.uniform
        (measured,) = yield Generation([grid.proposal(parent, 0, 0)])
        least = math.inf if measured.dropped else measured.misalignment
        price = measured.block_runs  # of the parent, and at most of its reference
        left = math.inf if self.block_runs is None else self.block_runs - 2 * price
        budget = RunBudget(left, len(layout.blocks), windows, price)
        stages = (*zip(self.windows, self.survivors, strict=True), (None, 1))
        for generation in range(1, self.generations + 1):
            pool = list(enumerate(grid.offspring(parent, self.offspring, rng)))
            for stage_windows, survivors in stages:
                pool = pool[: budget.affordable(stage_windows)]
                if not pool:
                    return None
                costs = yield Generation(
                    [grid.proposal(child, generation, i) for i, child in pool],
                    drop_early=min(survivors, len(pool)) == 1,
                    windows=stage_windows,
                )
                budget.pay(costs, stage_windows)
                order = sorted(range(len(pool)), key=lambda i: _rank(costs[i]))
                pool = [pool[i] for i in order[:survivors]]
            winner = costs[order[0]]
            if not winner.dropped and winner.misalignment <= least:
                parent, least = pool[0][1], winner.misalignment
        return None


def _rank(cost: Measurement) -> tuple[bool, float]:
    return cost.dropped, cost.misalignment


@dataclass(frozen=True)
class LevelGrid:
    """The levels that linears can take, and the ratios that they mean.

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
    def around(cls, layout: Layout, sparsity: float, step: float) -> LevelGrid:
        """Return levels that are `step` of the smallest linear's weights apart."""
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
    def uniform(self) -> Levels:
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
        different: dict[Levels, None] = {}
        for _ in range(4 * count):
            child = self.mutate(parent, rng)
            if child != parent:
                different[child] = None
            if len(different) == count:
                break
        return list(different)

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
