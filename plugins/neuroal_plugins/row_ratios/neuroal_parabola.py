"""NeuroAL's row step with its lambda where a parabola through few candidates is least."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from torch import Tensor

from neuroal import Generation, Layout, Measurement, Proposal, hookimpl, option
from neuroal_plugins import parabola
from neuroal_plugins.row_ratios.neuroal import Neuroal, row_proposal


@dataclass(frozen=True, eq=False)
class NeuroalParabola:
    """The ratios of `neuroal`, lam at the vertex of a parabola as in `lambda_parabola`."""

    lambdas: tuple[float, ...] = option((0.0, 0.1, 0.2), "the three of the first round, rising")
    windows: tuple[int, ...] = option((3,), "search windows of every round")
    grouped_heads: bool = option(
        False, "score queries, keys and values whose heads are shared, by the mean over the sharing"
    )
    last_block: bool = option(False, "score the rows of the last block too")

    def __post_init__(self) -> None:
        parabola.check(self.lambdas, self.windows)

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms, whose difference is the deviation."""
        return frozenset({"input_norm"})

    @hookimpl
    def propose_row_ratios(
        self, layout: Layout, base: Mapping[str, float], deviation: Mapping[str, Tensor]
    ) -> Generator[Generation, list[Measurement], Proposal]:
        """Propose three lambdas a round, and return that of the last vertex."""
        rows = Neuroal(grouped_heads=self.grouped_heads, last_block=self.last_block)
        scores = rows.row_scores(layout, deviation)
        return parabola.search(
            self.lambdas, self.windows, lambda lam: row_proposal(layout, scores, lam, base)
        )
