"""The correlation matrix distance of the dense and the pruned inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Statistics, hookimpl


@dataclass(frozen=True, eq=False)
class CorrelationDistance:
    """1 - tr(R R') / (||R||_F ||R'||_F) of the Gram matrices R, R' (Herdin et al. 2005).

    Computed as ||R/|R| - R'/|R'|||^2 / 2, the same number without the cancellation. A matrix that
    is all zero has nothing in common with another: 1.
    """

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the Gram matrix."""
        return frozenset({"gram"})

    @hookimpl
    def measure_linear(self, dense: Statistics, pruned: Statistics) -> Tensor:
        """Return the distance, float32, in [0, 1]."""
        a, b = dense.gram, pruned.gram  # (in, in)
        size_a, size_b = _size(a), _size(b)
        apart = a / size_a.where(size_a != 0, 1) - b / size_b.where(size_b != 0, 1)
        return (apart.square().sum() / 2).where((size_a == 0) == (size_b == 0), 1)


def _size(matrix: Tensor) -> Tensor:
    size: Tensor = torch.linalg.matrix_norm(matrix)
    return size
