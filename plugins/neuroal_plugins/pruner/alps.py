"""ALPS: ADMM with exact top-k projections, then conjugate gradients on the support it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Linear, PrunedLinear, PrunerTraits, Statistics, Target, hookimpl, option
from neuroal_plugins import second_order

CHECK_EVERY = 3  # iterations between two checks of how much the support has changed
# (fraction of the kept weights that changed, growth of ρ), from the largest down
SCHEDULE = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@dataclass(frozen=True, eq=False)
class Alps:
    """min tr (W-W₀)H(W-W₀)ᵀ over k-sparse W (Meng et al. 2024, eq. 1; algorithms 1 and 2).

    ADMM on the copy D of W that is k-sparse, with ρ growing as the support settles, then
    conjugate gradients over the weights of the final support.
    """

    damping: float = option(0.01, "added to the Gram matrix's diagonal, times its mean")
    rho: float = option(0.1, "first penalty of the split")
    iterations: int = option(300, "ADMM steps at most")
    gradient_steps: int = option(10, "conjugate-gradient steps on the final support")

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= second_order.LARGEST_DAMPING:
            raise ValueError(f"damping {self.damping} is outside [0, 1]")
        if self.rho <= 0:
            raise ValueError(f"rho {self.rho} is not positive")
        if self.iterations < 1:
            raise ValueError(f"iterations {self.iterations} is not a positive number")
        if self.gradient_steps < 0:
            raise ValueError(f"gradient_steps {self.gradient_steps} is negative")

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
        """Return |W_ij| * sqrt(H_jj), damped, by which the first support is chosen."""
        gram = statistics["gram"]
        norm = second_order.damped(gram, self.damping).diagonal().sqrt() + 1e-8
        return weight.abs() * norm

    @hookimpl
    def prune_linears(
        self,
        weights: Tensor,
        targets: Sequence[Target],
        statistics: Sequence[Statistics],
        linears: Sequence[Linear],
    ) -> list[PrunedLinear]:
        """Minimise the output error over weights that meet the targets."""
        if second_order.prunes_nothing(targets):
            return second_order.untouched(weights)
        key = ("alps", self.damping)
        norm, product, values, vectors = second_order.factors(
            self._factor, key, statistics, linears
        )
        norm = norm[:, None]  # (n, 1, in)
        scaled = weights * norm  # (n, out, in)
        aim = scaled @ product  # H W₀
        sparse, masks = self._split(scaled, aim, values, vectors, targets)
        sparse = solve_on_support(sparse, aim, product, masks, self.gradient_steps)
        return [PrunedLinear(*answer) for answer in zip(sparse / norm, masks, strict=True)]

    def _factor(self, gram: Tensor, linear: Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the norms, the damped normalised H, its eigenvalues and its eigenvectors."""

        def build(damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
            product = second_order.damped(gram, damping)
            norm = product.diagonal().sqrt() + 1e-8  # (in,)
            product = product / norm / norm[:, None]
            try:
                values, vectors = torch.linalg.eigh(product)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                return None
            return norm, product, values.clamp(min=0), vectors

        return second_order.climb(build, self.damping, linear)

    def _split(
        self,
        dense: Tensor,
        aim: Tensor,
        values: Tensor,
        vectors: Tensor,
        targets: Sequence[Target],
    ) -> tuple[Tensor, Tensor]:
        """Return D and its masks after ADMM; the eigenvectors make a change of ρ cheap.

        Every linear has a ρ of its own, and leaves the iteration when its support has settled.
        """
        counts = second_order.counts_of(targets, dense.shape[1])
        zeros = second_order.zeros_of(targets, dense)
        masks = checked = second_order.choose_masks(dense.abs(), counts, targets[0], zeros)
        sparse = dense * ~masks  # D
        dual = torch.zeros_like(dense)  # V
        rho = dense.new_full((len(dense), 1, 1), self.rho)
        inverse = _inverse(values, vectors, rho)
        settled, support = torch.empty_like(sparse), torch.empty_like(masks)
        left = torch.arange(len(dense), device=dense.device)  # linears whose support still changes
        for step in range(1, self.iterations + 1):
            split = (aim - dual + rho * sparse) @ inverse  # W
            wanted = split + dual / rho
            masks = second_order.choose_masks(wanted.abs(), counts, targets[0], zeros)
            sparse = wanted * ~masks
            dual = dual + rho * (split - sparse)
            if step % CHECK_EVERY and step < self.iterations:
                continue
            settled[left], support[left] = sparse, masks
            growth = _growth(masks, checked)
            going = [i for i, more in enumerate((growth > 0).tolist()) if more]
            if not going:
                break
            if len(going) < len(growth):
                state = (left, aim, values, vectors, counts, sparse, masks, dual, rho, growth)
                left, aim, values, vectors, counts, sparse, masks, dual, rho, growth = (
                    x[torch.tensor(going, device=x.device)] for x in state
                )
                zeros = None if zeros is None else zeros[torch.tensor(going, device=zeros.device)]
            rho, checked = rho * growth[:, None, None], masks
            inverse = _inverse(values, vectors, rho)
        return settled, support


def _inverse(values: Tensor, vectors: Tensor, rho: Tensor) -> Tensor:
    """Return (H + ρI)⁻¹ `(n, in, in)` of H's eigenvalues, its eigenvectors and ρ `(n, 1, 1)`."""
    return (vectors / (values[:, None] + rho)) @ vectors.mT


def _growth(masks: Tensor, before: Tensor) -> Tensor:
    """Return by how much each ρ grows after a change of its support, `(n,)`; 0 if none."""
    changed = (masks ^ before).flatten(1).sum(1)
    kept = (~masks).flatten(1).sum(1).double()
    growth = torch.zeros_like(kept, dtype=torch.float32)
    for fraction, factor in reversed(SCHEDULE):  # the largest that is exceeded has the last word
        growth = torch.where(changed > fraction * kept, factor, growth)
    return growth


def solve_on_support(
    start: Tensor, aim: Tensor, product: Tensor, mask: Tensor, steps: int
) -> Tensor:
    """Take conjugate-gradient steps on W H = H W₀ over the kept weights, each row for itself.

    H has a unit diagonal, so that the diagonal preconditioner of the paper is the identity.

    Args:
        start: `(n, out, in)`, zero where pruned.
        aim: H W₀, `(n, out, in)`.
        product: H, `(n, in, in)`.
        mask: bool `(n, out, in)`, True = pruned; those stay 0.
        steps: At least 0.

    Returns:
        `(n, out, in)`.
    """
    solution = start
    kept = (~mask).to(start.dtype)
    residual = (aim - solution @ product) * kept
    direction = residual
    size = residual.square().sum(-1, keepdim=True)  # (n, out, 1)
    for _ in range(steps):
        image = (direction @ product) * kept
        step = _ratio(size, (direction * image).sum(-1, keepdim=True))
        solution = solution + step * direction
        residual = residual - step * image
        last, size = size, residual.square().sum(-1, keepdim=True)
        direction = residual + _ratio(size, last) * direction
    return solution


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a/b, 0 where b is not positive: a row that is solved stays as it is."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))
