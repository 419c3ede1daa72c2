"""SparseSwaps: exchange one kept for one pruned weight while that lowers a row's output error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Linear, Pattern, Statistics, Target, hookimpl, option

AT_ONCE = 2**20  # pairs that are compared in one step, over all its rows
PER_PASS = 8  # exchanges of a row before its candidates are chosen again
LEAST_GAIN = 1e-6  # times the terms that a change of the error is made of: less may be rounding


@dataclass(frozen=True, eq=False)
class SparseSwaps:
    """The best exchanges of two weights in each row (Zimmer et al. 2025, SparseSwaps).

    The error of a row is L = e H eᵀ, with e its pruned weights. With c = e H, pruning u and
    bringing back p changes L by 2 w_u c_u + w_u² H_uu - 2 w_p c_p + w_p² H_pp - 2 w_u w_p H_up.
    The pair that lowers L most is exchanged, until no pair lowers it.
    """

    candidates: int = option(64, "kept and pruned weights of a row that are paired; 0 for all")
    swaps: int = option(100, "exchanges per row at most")
    shrinkage: float = option(
        0.0, "share taken from H between inputs; 1 leaves what Wanda sees, the diagonal"
    )

    def __post_init__(self) -> None:
        if self.candidates < 0:
            raise ValueError(f"candidates {self.candidates} is negative")
        if self.swaps < 0:
            raise ValueError(f"swaps {self.swaps} is negative")
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage {self.shrinkage} is outside [0, 1]")

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the Gram matrix of the inputs."""
        return frozenset({"gram"})

    @hookimpl
    def refine_mask(
        self, weight: Tensor, mask: Tensor, target: Target, statistics: Statistics, linear: Linear
    ) -> Tensor:
        """Return a mask with as many weights pruned in every row and every N:M group.

        The candidates are those that change the error least on their own; under a pattern, all
        weights, in pairs of one group.
        """
        gram = statistics["gram"]
        if self.shrinkage:
            gram = gram.lerp(torch.diag(gram.diagonal()), self.shrinkage)
        state = SwapState(weight, mask.clone(), gram, (weight * mask) @ gram)
        limit = self.candidates or mask.shape[1]
        kept, pruned = (min(limit, int(x.sum(1).max())) for x in (~mask, mask))
        pairs = kept * pruned if target.pattern is None else mask.shape[1] * target.pattern.of
        left = torch.full_like(mask[:, 0], self.swaps, dtype=torch.long)
        rows = (mask.any(1) & ~mask.all(1) & (left > 0)).nonzero().flatten()
        while len(rows):
            counts = []
            for part in torch.split(rows, max(1, AT_ONCE // pairs)):
                if target.pattern is None:
                    columns = state.candidates(part, kept, pruned)
                else:
                    columns = state.groups(part, target.pattern)
                counts.append(state.exchange(part, *columns, left[part]))
            made = torch.cat(counts)
            left[rows] -= made
            rows = rows[(made > 0) & (left[rows] > 0)]
        return state.mask


@dataclass(frozen=True, eq=False)
class SwapState:
    """A weight and its mask, which exchanges change in place.

    Attributes:
        weight: w, float32 `(out, in)`.
        mask: bool `(out, in)`, True = pruned.
        gram: H, float32 `(in, in)`.
        correlation: c = e H, float32 `(out, in)`, with e the pruned weights.
    """

    weight: Tensor
    mask: Tensor
    gram: Tensor
    correlation: Tensor

    def candidates(self, rows: Tensor, kept: int, pruned: int) -> tuple[Tensor, Tensor]:
        """Return the columns of rows `(n,)` that change the error least on their own.

        Returns:
            Columns to prune, int64 `(n, 1, kept)`, and to bring back, `(n, 1, pruned)`, ascending.
            A row that has fewer is filled up with columns of the other kind.
        """
        weight, mask = self.weight[rows], self.mask[rows]
        own, cross = weight.square() * self.gram.diagonal(), 2 * weight * self.correlation[rows]
        prune = (own + cross).masked_fill_(mask, torch.inf).topk(kept, largest=False).indices
        restore = (own - cross).masked_fill_(~mask, torch.inf).topk(pruned, largest=False).indices
        return prune.sort().values[:, None], restore.sort().values[:, None]

    def groups(self, rows: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Return all columns of rows `(n,)` by group, int64 `(n, groups, of)`, twice."""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        columns = columns.view(1, -1, pattern.of).expand(len(rows), -1, -1)
        return columns, columns

    def exchange(self, rows: Tensor, kept: Tensor, pruned: Tensor, left: Tensor) -> Tensor:
        """Exchange the best pair of every row, up to `PER_PASS` times.

        Args:
            rows: int64 `(n,)`.
            kept: Columns that may be pruned, int64 `(n, groups, a)`.
            pruned: Columns of the same groups that may be brought back, `(n, groups, b)`.
            left: Exchanges that each row may still make, `(n,)`.

        Returns:
            Exchanges that each row has made, int64 `(n,)`.
        """
        gram, n = self.gram, torch.arange(len(rows), device=rows.device)
        weight, mask, correlation = self.weight[rows], self.mask[rows], self.correlation[rows]
        error = (weight * mask * correlation).sum(1)  # L
        weight_u, weight_p = _at(weight, kept), _at(weight, pruned)
        own_u = weight_u.square() * gram.diagonal()[kept]  # w_u² H_uu
        own_p = weight_p.square() * gram.diagonal()[pruned]
        joint = self._between(kept, pruned).mul_(weight_u[..., None]).mul_(weight_p[..., None, :])
        free_u = own_u.masked_fill(_at(mask, kept), torch.inf)
        free_p = own_p.masked_fill(~_at(mask, pruned), torch.inf)
        made, changes = torch.zeros_like(left), torch.empty_like(joint)
        for _ in range(PER_PASS):
            prune = torch.addcmul(free_u, weight_u, _at(correlation, kept), value=2)
            restore = torch.addcmul(free_p, weight_p, _at(correlation, pruned), value=-2)
            torch.add(prune[..., None], joint, alpha=-2, out=changes).add_(restore[..., None, :])
            change, best = changes.amin(3).flatten(1).min(1)
            group, u = best // kept.shape[2], best % kept.shape[2]
            p = changes[n, group, u].argmin(1)
            terms = error + own_u[n, group, u] + own_p[n, group, p]
            moves = ((change < -LEAST_GAIN * terms) & (made < left)).nonzero().flatten()
            if not len(moves):
                break
            made[moves] += 1
            group, u, p = group[moves], u[moves], p[moves]
            free_u[moves, group, u], free_p[moves, group, p] = torch.inf, torch.inf
            u, p = kept[moves, group, u], pruned[moves, group, p]
            mask[moves, u], mask[moves, p] = True, False
            correlation[moves] += (
                weight[moves, u, None] * gram[u] - weight[moves, p, None] * gram[p]
            )
        self.mask[rows], self.correlation[rows] = mask, correlation
        return made

    def _between(self, kept: Tensor, pruned: Tensor) -> Tensor:
        """Return H_up of every pair within a group, `(n, groups, a, b)`."""
        places = kept[..., None] * self.gram.shape[1] + pruned[..., None, :]
        return self.gram.flatten().index_select(0, places.flatten()).view(places.shape)


def _at(values: Tensor, columns: Tensor) -> Tensor:
    """Return the values `(n, in)` at columns `(n, groups, a)`, in their shape."""
    return values.gather(1, columns.flatten(1)).view(columns.shape)
