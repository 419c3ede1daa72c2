"""The linear schedule with its slope where a parabola through few candidates is least."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from neuroal import Generation, Layout, Measurement, Proposal, hookimpl, option
from neuroal_plugins import parabola
from neuroal_plugins.block_ratios.linear_schedule import schedule


@dataclass(frozen=True, eq=False)
class LambdaParabola:
    """ratio_b = S - lam + 2 lam b / (L - 1), lam at the vertex of a parabola (Brent 1973, ch. 5).

    Misalignment against lam is flat around its minimum and noisy on few windows: three candidates
    far apart say more about where it is than many close together. A round has three candidates; in
    each further one they are half as far apart, around the vertex.
    """

    lambdas: tuple[float, ...] = option((0.0, 0.1, 0.2), "the three of the first round, rising")
    windows: tuple[int, ...] = option((2,), "search windows of every round")

    def __post_init__(self) -> None:
        parabola.check(self.lambdas, self.windows)

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float
    ) -> Generator[Generation, list[Measurement], Proposal]:
        """Propose three slopes a round, and return that of the last vertex."""
        return parabola.search(
            self.lambdas, self.windows, lambda lam: schedule(layout, lam, sparsity)
        )
