"""NoWag-P for neuroal: weights normalised by column and row, and by how loud their input is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from neuroal import PrunerTraits, Statistics, hookimpl, option


@dataclass(frozen=True, eq=False)
class Nowag:
    """(W_ij / (c_j r_i))^2 * n_j^2, c the columns' norms, r those of the rows of W / c (NoWag-P).

    Liu et al. 2025, arXiv:2504.14569. An empty row or column scores 0.
    """

    comparison: Literal["matrix", "row"] = option(
        "matrix", "weights compete within the whole matrix, or within a row"
    )

    @hookimpl
    def describe(self) -> PrunerTraits:
        """Return the comparison that was asked for."""
        return PrunerTraits(comparison=self.comparison)

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms."""
        return frozenset({"input_norm"})

    @hookimpl
    def score_weights(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return the scores, float32 `(out, in)`."""
        normalised = weight / _norms(weight, dim=0)  # by (1, in)
        normalised = normalised / _norms(normalised, dim=1)  # by (out, 1)
        return (normalised * statistics.input_norm).square()


def _norms(weight: Tensor, dim: int) -> Tensor:
    norms = weight.square().sum(dim=dim, keepdim=True).sqrt()
    return norms.where(norms != 0, 1)
