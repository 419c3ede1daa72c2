"""NeuroAL's block step: ratios that grow from the first block to the last."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from neuroal import Generation, Layout, Measurement, Proposal, hookimpl, option
from neuroal_plugins import density

LAMBDAS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25)


@dataclass(frozen=True, eq=False)
class LinearSchedule:
    """ratio_b = S - lam + 2 lam b / (L - 1), the best-aligned of a grid of lam (NeuroAL).

    Cunegatti et al. 2025, arXiv:2411.07066, block step. ATP's arithmetic progression is the same
    line with beta = 2 lam / (L - 1). The paper's grid ends with 0.25, which it leaves out from a
    sparsity of 0.8 on; so does this plugin with the grid of the paper, whereas a list that was
    asked for is measured whole.
    """

    lambdas: tuple[float, ...] = option(
        LAMBDAS,
        "distances of the first and last block's ratio from the sparsity, one candidate each",
    )

    def __post_init__(self) -> None:
        density.check_lambdas(self.lambdas)

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float
    ) -> Generator[Generation, list[Measurement], None]:
        """Propose every lam of the grid in one generation; the best-aligned wins."""
        lambdas = self.lambdas
        if lambdas == LAMBDAS and sparsity >= 0.8:
            lambdas = LAMBDAS[:-1]
        yield Generation([schedule(layout, lam, sparsity) for lam in lambdas])


def schedule(layout: Layout, lam: float, sparsity: float) -> Proposal:
    """Return the linear schedule of one lam as a proposal."""
    ratios = density.linear_schedule(len(layout.blocks), lam, sparsity)
    return Proposal(layout.per_block(ratios), {"lam": lam})
