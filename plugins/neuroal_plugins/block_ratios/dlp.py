"""DLP: blocks of small scores stay denser."""

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
class Dlp:
    """q_b = 1 - m_b / sum(m), m_b the mean Wanda score, and a density that grows with q.

    Chen et al. 2025, arXiv:2505.23807. Equal m give every block the same ratio.
    """

    alpha: float = option(0.15, "half the distance between the densest and the sparsest block")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1)")

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms."""
        return frozenset({"input_norm"})

    @hookimpl
    def measure_block(
        self, block: Block, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics]
    ) -> dict[str, Tensor]:
        """Return the mean score over all weights of the block, float64."""
        totals = [
            WANDA.score_weights(weights[linear.name], statistics[linear.name]).sum()
            for linear in block.linears
        ]
        return {"mean": torch.stack(totals).sum().cpu().double() / block.weights}

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float, measurements: Sequence[Mapping[str, Tensor]]
    ) -> Generator[Generation, list[Measurement], Proposal]:
        """Return the one allocation; nothing is measured."""
        yield from ()
        means = torch.stack([m["mean"].cpu().double() for m in measurements])
        total = means.sum()
        importance = 1 - means / total.where(total != 0, 1)
        ratios = density.clip_block_ratios(density.spread(importance, self.alpha, sparsity))
        return Proposal(layout.per_block(ratios), {"alpha": self.alpha})
