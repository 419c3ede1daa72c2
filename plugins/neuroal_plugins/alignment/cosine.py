"""Cosine distance of the input norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Statistics, hookimpl


@dataclass(frozen=True, eq=False)
class Cosine:
    """1 - cos(a, b) of the dense and pruned input norms a, b.

    Computed as ||a/|a| - b/|b|||^2 / 2, the same number without the cancellation of 1 - cos. Norms
    that are all zero in one of the two runs are at right angles to the others: 1.
    """

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms."""
        return frozenset({"input_norm"})

    @hookimpl
    def measure_linear(self, dense: Statistics, pruned: Statistics) -> Tensor:
        """Return the cosine distance, float32, in [0, 1]."""
        a, b = dense.input_norm, pruned.input_norm  # (in,)
        length_a, length_b = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
        half_square = (_unit(a, length_a) - _unit(b, length_b)).square().sum() / 2
        return half_square.where((length_a == 0) == (length_b == 0), 1)


def _unit(vector: Tensor, length: Tensor) -> Tensor:
    return vector / length.where(length != 0, 1)
