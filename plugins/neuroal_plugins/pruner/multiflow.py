"""Multiflow: weights by the flow through the neurons that they connect."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from neuroal import Statistics, hookimpl


@dataclass(frozen=True, eq=False)
class Multiflow:
    """|W_ij| * mean_j A_ij * mean_i A_ij, with A the Wanda score (Farina et al. 2024).

    arXiv:2404.05621. Computed in float32 whatever the weight's dtype: the product of three small
    numbers underflows in half precision.
    """

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms."""
        return frozenset({"input_norm"})

    @hookimpl
    def score_weights(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return |W| * r * c, float32 `(out, in)`."""
        magnitude = weight.float().abs()
        flow = magnitude * statistics.input_norm.float()  # (out, in)
        rows, columns = flow.mean(dim=1, keepdim=True), flow.mean(dim=0, keepdim=True)
        return magnitude * rows * columns  # (out, in) * (out, 1) * (1, in)
