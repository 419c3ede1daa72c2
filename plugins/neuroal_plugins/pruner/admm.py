"""ADMM: alternate between the least-squares weights and the nearest sparse ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Linear, PrunedLinear, PrunerTraits, Statistics, Target, hookimpl, option
from neuroal_plugins import second_order


@dataclass(frozen=True, eq=False)
class Admm:
    """ADMM with gradual magnitude masks on normalised inputs (Boža 2024, algorithms 1 and 2).

    The sparsity climbs as S(1 - (1 - t/ramp)³); then the mask stays while the weights settle.
    """

    damping: float = option(0.1, "added to the normalised Gram matrix's diagonal, times its mean")
    rho: float = option(1.0, "penalty of the split")
    iterations: int = option(20, "ADMM steps")
    ramp: int = option(15, "steps that choose the mask anew")

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= second_order.LARGEST_DAMPING:
            raise ValueError(f"damping {self.damping} is outside [0, 1]")
        if self.rho <= 0:
            raise ValueError(f"rho {self.rho} is not positive")
        if not 1 <= self.ramp <= self.iterations:
            raise ValueError(
                f"ramp {self.ramp} is outside [1, iterations] with iterations {self.iterations}"
            )

    @hookimpl
    def describe(self) -> PrunerTraits:
        """Return that weights compete in the matrix."""
        return PrunerTraits(comparison="matrix", row_ratios=False)

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the Gram matrix."""
        return frozenset({"gram"})

    @hookimpl
    def score_weights(self, weight: Tensor, statistics: Statistics, linear: Linear) -> Tensor:
        """Return |W_ij| * sqrt(H_jj), by which the first step chooses its mask."""
        norm = statistics["gram"].diagonal().sqrt() + 1e-8
        return weight.abs() * norm

    @hookimpl
    def prune_linears(
        self,
        weights: Tensor,
        targets: Sequence[Target],
        statistics: Sequence[Statistics],
        linears: Sequence[Linear],
    ) -> list[PrunedLinear]:
        """Minimise the output error over weights that meet the targets; N:M has no ramp."""
        if second_order.prunes_nothing(targets):
            return second_order.untouched(weights)
        key = ("admm", self.damping, self.rho)
        norm, product, inverse = second_order.factors(self._factor, key, statistics, linears)
        counts = second_order.counts_of(targets, weights.shape[1])
        zeros = second_order.zeros_of(targets, weights)
        norm = norm[:, None]  # (n, 1, in)
        scaled = weights * norm  # W', (n, out, in)
        aim = scaled @ product  # H W'_0
        dual = torch.zeros_like(scaled)  # U
        masks = torch.zeros_like(scaled, dtype=torch.bool)
        for step in range(1, self.iterations + 1):
            wanted = scaled + dual
            if step <= self.ramp:
                fraction = 1 - (1 - step / self.ramp) ** 3
                some = (counts.double() * fraction).floor().long()
                masks = second_order.choose_masks(wanted.abs(), some, targets[0], zeros)
            # Z is `wanted` without what is pruned, and the new U is the rest of it.
            dual = wanted * masks
            scaled = torch.where(masks, -wanted, wanted).mul_(self.rho).add_(aim) @ inverse
        moved = (scaled + dual).masked_fill(masks, 0) / norm
        return [PrunedLinear(*answer) for answer in zip(moved, masks, strict=True)]

    def _factor(self, gram: Tensor, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input norms, the damped normalised H and the inverse of H + ρI."""
        norm = gram.diagonal().sqrt() + 1e-8  # (in,)
        normalised = gram / norm / norm[:, None]
        identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)

        def build(damping: float) -> tuple[Tensor, Tensor] | None:
            product = second_order.damped(normalised, damping)
            lower = second_order.cholesky(product + self.rho * identity)
            return None if lower is None else (product, torch.cholesky_inverse(lower))

        return norm, *second_order.climb(build, self.damping, linear)
