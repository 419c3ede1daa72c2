"""NeuroAL's neuron alignment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Statistics, hookimpl


@dataclass(frozen=True, eq=False)
class Neuron:
    """||a / sum(a) - b / sum(b)||_2 / d of the d dense and pruned input norms a, b (NeuroAL).

    Cunegatti et al. 2025, arXiv:2411.07066. Norms that are all zero stay zero.
    """

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms."""
        return frozenset({"input_norm"})

    @hookimpl
    def measure_linear(self, dense: Statistics, pruned: Statistics) -> Tensor:
        """Return the distance between the shares that the inputs have of the whole, float32."""
        a, b = _shares(dense.input_norm), _shares(pruned.input_norm)
        distance: Tensor = torch.linalg.vector_norm(a - b)
        return distance / a.numel()


def _shares(norms: Tensor) -> Tensor:
    total = norms.sum()
    return norms / total.where(total != 0, 1)  # (in,)
