"""OWL: blocks with more outliers stay denser."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Block, Generation, Layout, Measurement, Proposal, Statistics, hookimpl, option
from neuroal_plugins import density
from neuroal_plugins.pruner.wanda import Wanda

WANDA = Wanda()


@dataclass(frozen=True, eq=False)
class Owl:
    """D_b = 100 #{A > M mean(A)} / #A, and a density that grows with it (Yin et al. 2024).

    arXiv:2310.05175. A is the Wanda score of all weights of the block, whatever the base
    pruner; equal D give every block the same ratio.
    """

    M: float = option(5.0, "a weight is an outlier above this multiple of the block's mean score")
    lam: float = option(0.08, "half the distance between the densest and the sparsest block")

    def __post_init__(self) -> None:
        if self.M <= 0:
            raise ValueError(f"M={self.M} is not positive")
        density.check_lambdas((self.lam,))

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms."""
        return frozenset({"input_norm"})

    @hookimpl
    def measure_block(
        self, block: Block, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics]
    ) -> dict[str, Tensor]:
        """Return the percentage of outliers, float64."""
        # Scored twice, one linear at a time: all scores at once would be a second block.
        names = [linear.name for linear in block.linears]
        totals = [WANDA.score_weights(weights[n], statistics[n]).sum() for n in names]
        threshold = self.M * (torch.stack(totals).sum() / block.weights)
        counts = [(WANDA.score_weights(weights[n], statistics[n]) > threshold).sum() for n in names]
        return {"outliers": 100 * torch.stack(counts).sum().cpu().double() / block.weights}

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float, measurements: Sequence[Mapping[str, Tensor]]
    ) -> Generator[Generation, list[Measurement], Proposal]:
        """Return the one allocation; nothing is measured."""
        yield from ()
        scores = torch.stack([m["outliers"] for m in measurements])
        ratios = density.clip_block_ratios(density.spread(scores, self.lam, sparsity))
        return Proposal(layout.per_block(ratios), {"lam": self.lam, "M": self.M})
