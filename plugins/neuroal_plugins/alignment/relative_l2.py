"""Relative error of the activations themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Statistics, hookimpl


@dataclass(frozen=True, eq=False)
class RelativeL2:
    """||X - X'||_F / ||X||_F of the dense and pruned inputs X, X' of a linear.

    Norms forget signs and which token was changed; this does not. Where X is zero the error is
    taken as it is.
    """

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms and the squared input error."""
        return frozenset({"input_norm", "input_error"})

    @hookimpl
    def measure_linear(self, dense: Statistics, pruned: Statistics) -> Tensor:
        """Return the relative error, float32."""
        size: Tensor = torch.linalg.vector_norm(dense.input_norm)
        return pruned.input_error.sum().sqrt() / size.where(size != 0, 1)
