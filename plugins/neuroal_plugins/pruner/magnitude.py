"""Magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from neuroal import PrunerTraits, hookimpl, option


@dataclass(frozen=True, eq=False)
class Magnitude:
    """|W_ij| (Han et al. 2015, arXiv:1506.02626)."""

    comparison: Literal["row", "matrix"] = option(
        "row", "weights compete within a row, or within the whole matrix"
    )

    @hookimpl
    def describe(self) -> PrunerTraits:
        """Return the comparison that was asked for."""
        return PrunerTraits(comparison=self.comparison)

    @hookimpl
    def score_weights(self, weight: Tensor) -> Tensor:
        """Return |W|, `(out, in)`."""
        return weight.abs()
