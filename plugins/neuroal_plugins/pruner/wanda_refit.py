"""Wanda, and a short refit on the same inputs: what a search sees of a reconstruction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from neuroal import Linear, PrunedLinear, Statistics, Target, hookimpl, mask_for, option
from neuroal_plugins.reconstruction.refit import default_damping, solve


@dataclass(frozen=True, eq=False)
class WandaRefit:
    """Wanda's mask (Sun et al. 2023, eq. 1), and the weights that survive by least squares.

    They minimise the error of the linear's output on the inputs that the pruned model has, drawn
    towards the weight as it is. As `--search-pruner` it shows a search what `--reconstruction
    refit` will make of its candidates, without a walk of the dense model.
    """

    steps: int = option(6, "of conjugate gradients")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} is not positive")

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the Gram matrix."""
        return frozenset({"gram"})

    @hookimpl
    def score_weights(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return Wanda's scores, `(out, in)`, by which the mask is chosen."""
        return weight.abs() * statistics["gram"].diagonal().clamp(min=0).sqrt()

    @hookimpl
    def prune_linear(
        self, weight: Tensor, target: Target, statistics: Statistics, linear: Linear
    ) -> PrunedLinear:
        """Return the refitted weights under Wanda's mask."""
        gram = statistics["gram"]  # (in, in)
        mask = mask_for(self.score_weights(weight, statistics), target)
        start = weight.masked_fill(mask, 0)
        damp = default_damping(statistics, linear) * float(gram.diagonal().mean())
        if damp == 0:  # no input was ever anything but 0
            return PrunedLinear(start, mask)
        _, fitted = solve(gram, weight @ gram, weight, start, mask, damp, self.steps)
        return PrunedLinear(fitted.values, mask)
