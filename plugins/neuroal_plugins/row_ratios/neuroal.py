"""NeuroAL's row step: rows whose output lost more stay denser."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Generation, Layout, Linear, Measurement, Proposal, hookimpl, option
from neuroal_plugins import density

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
    """

    lambdas: tuple[float, ...] = option(
        LAMBDAS, "half the distances between the densest and sparsest row, one candidate each"
    )

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
        scores = {
            name: _row_scores(layout, linear, deviation) for name, linear in layout.linears.items()
        }
        yield Generation(
            [
                Proposal(
                    {n: _row_ratios(layout.linears[n], x, lam, base[n]) for n, x in scores.items()},
                    {"lam": lam},
                )
                for lam in self.lambdas
            ]
        )


def _row_scores(layout: Layout, linear: Linear, deviation: Mapping[str, Tensor]) -> Tensor | None:
    """Return the deviation at the consumer, `(out,)` on the CPU, or None for no score."""
    if linear.paired is None or linear.block == layout.blocks[-1].index:
        return None
    scores = deviation[linear.paired].cpu()
    if len(scores) != linear.out_features or scores.sum() == 0 or scores.min() == scores.max():
        return None
    return scores


def _row_ratios(linear: Linear, scores: Tensor | None, lam: float, base: float) -> Tensor:
    """Return the ratio of every row, float64 `(out,)`."""
    if scores is None:
        return torch.full((linear.out_features,), base, dtype=torch.float64)
    return density.clip_row_ratios(density.spread(scores, lam, base))
