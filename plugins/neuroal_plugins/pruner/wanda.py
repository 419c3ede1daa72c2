"""Wanda: weights by their magnitude and the norm of their input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from neuroal import PrunerTraits, Statistics, hookimpl


@dataclass(frozen=True, eq=False)
class Wanda:
    """|W_ij| * ||X_j||_2 (Sun et al. 2023, arXiv:2306.11695, eq. 1)."""

    @hookimpl
    def describe(self) -> PrunerTraits:
        """Return the defaults, and what the scores are."""
        return PrunerTraits(magnitude_times="input_norm")

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms."""
        return frozenset({"input_norm"})

    @hookimpl
    def score_weights(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return |W| * n, `(out, in)`."""
        return weight.abs() * statistics.input_norm  # (out, in) * (in,)
