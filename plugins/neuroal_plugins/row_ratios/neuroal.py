"""NeuroAL's row step: rows whose output lost more stay denser."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Generation, Layout, Linear, Measurement, Proposal, hookimpl, option
from neuroal_plugins import density
from neuroal_plugins.heads import Heads

LAMBDAS = (
    *(0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1),
    *(0.12, 0.15, 0.2, 0.25),
)


@dataclass(frozen=True, eq=False)
class Neuroal:
    """density_i = 2 lam minmax(x)_i - mean(same term) + 1 - ratio, the best of a grid of lam.

    Cunegatti et al. 2025, arXiv:2411.07066, row step. x is the deviation, dense minus pruned input
    norm, at the linear's consumer. Every row gets the base ratio in the last block, in a linear
    without a consumer or whose rows are not its consumer's inputs, and where the deviation sums to
    zero or is the same for all rows.

    Where several query heads share a key/value head, rows and inputs differ in number, and the
    paper gives these linears the base ratio. With `grouped_heads` a query's row is scored by the
    output projection's input of its place, and a row of a key or value by the mean over the query
    heads that share it. With `last_block` the last block's rows are scored like the others'.
    """

    lambdas: tuple[float, ...] = option(
        LAMBDAS, "half the distances between the densest and sparsest row, one candidate each"
    )

    grouped_heads: bool = option(
        False, "score queries, keys and values whose heads are shared, by the mean over the sharing"
    )

    last_block: bool = option(False, "score the rows of the last block too")

    def __post_init__(self) -> None:
        density.check_lambdas(self.lambdas)

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms, whose difference is the deviation."""
        return frozenset({"input_norm"})

    @hookimpl
    def propose_row_ratios(
        self, layout: Layout, base: Mapping[str, float], deviation: Mapping[str, Tensor]
    ) -> Generator[Generation, list[Measurement], None]:
        """Propose every lam of the grid in one generation; the best-aligned wins."""
        scores = self.row_scores(layout, deviation)
        yield Generation([row_proposal(layout, scores, lam, base) for lam in self.lambdas])

    def row_scores(
        self, layout: Layout, deviation: Mapping[str, Tensor]
    ) -> dict[str, Tensor | None]:
        """Return the deviation at every linear's consumer, `(out,)` on the CPU; None for none."""
        return {n: self._row_scores(layout, x, deviation) for n, x in layout.linears.items()}

    def _row_scores(
        self, layout: Layout, linear: Linear, deviation: Mapping[str, Tensor]
    ) -> Tensor | None:
        if linear.block == layout.blocks[-1].index and not self.last_block:
            return None
        scores = None
        if linear.paired is not None:
            scores = deviation[linear.paired].cpu()
        elif self.grouped_heads:
            scores = _head_scores(layout, linear, deviation)
        if scores is None or len(scores) != linear.out_features:
            return None
        return None if scores.sum() == 0 or scores.min() == scores.max() else scores


def row_proposal(
    layout: Layout, scores: Mapping[str, Tensor | None], lam: float, base: Mapping[str, float]
) -> Proposal:
    """Return the proposal of one lam, given every linear's scores and base ratio."""
    ratios = {n: _row_ratios(layout.linears[n], x, lam, base[n]) for n, x in scores.items()}
    return Proposal(ratios, {"lam": lam})


def _head_scores(layout: Layout, linear: Linear, deviation: Mapping[str, Tensor]) -> Tensor | None:
    """Return the deviation at the attention's output projection per row of q, k and v."""
    heads = Heads.of(layout, linear)
    if heads is None:
        return None
    at_output = deviation[heads.output].cpu()
    shared = heads.summed(at_output) / heads.summed(torch.ones_like(at_output))
    scores = torch.full((linear.out_features,), torch.nan)
    for rows in linear.rows:
        own = rows.indices()
        if len(own) == len(at_output) and rows.name == "q":
            scores[own] = at_output
        elif len(own) == len(shared) and rows.name in ("k", "v"):
            scores[own] = shared
    return None if bool(scores.isnan().any()) else scores


def _row_ratios(linear: Linear, scores: Tensor | None, lam: float, base: float) -> Tensor:
    """Return the ratio of every row, float64 `(out,)`: `base` where there is no score."""
    if scores is None:
        return torch.full((linear.out_features,), base, dtype=torch.float64)
    return density.clip_row_ratios(density.spread(scores, lam, base))
