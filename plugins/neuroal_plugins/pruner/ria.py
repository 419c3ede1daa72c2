"""RIA: weights relative to their row and their column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from neuroal import PrunerTraits, Statistics, hookimpl, option


@dataclass(frozen=True, eq=False)
class Ria:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * n_j^a (Zhang et al. 2024).

    "Plug-and-Play: an efficient post-training pruning method for large language models", ICLR
    2024. An empty row or column adds nothing.
    """

    a: float = option(0.5, "exponent of the input norm, at least 0")
    comparison: Literal["row", "matrix"] = option(
        "matrix", "weights compete within the whole matrix, or within a row"
    )

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError(f"a={self.a} is negative: a silent input would score infinity")

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
        """Return the relative importance and activation, `(out, in)`."""
        magnitude = weight.abs()
        importance = magnitude / _nonzero(magnitude.sum(dim=0, keepdim=True))  # by (1, in)
        importance = importance + magnitude / _nonzero(magnitude.sum(dim=1, keepdim=True))
        return importance * statistics.input_norm.pow(self.a)


def _nonzero(total: Tensor) -> Tensor:
    return total.where(total != 0, 1)
