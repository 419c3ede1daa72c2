"""SparseGPT: prune column by column and let the columns to the right make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from neuroal import (
    Accumulator,
    Linear,
    PrunedLinear,
    PrunerTraits,
    Statistics,
    Target,
    hookimpl,
    option,
    row_mask,
)
from neuroal_plugins import second_order

STRIP = 32  # columns whose errors move what is behind them together


@dataclass(frozen=True)
class FadingNorm:
    """sqrt(sum over windows k = 1, 2, ... of ||x_k||^2 / k): the k-th window weighs 1/k.

    The published search of SparseGPT has it where every other method has `input_norm`; it stands
    in for that statistic in the walks that this pruner takes part in.
    """

    name: ClassVar[str] = "input_norm"
    compares: ClassVar[bool] = False

    def init(self, in_features: int, device: torch.device) -> dict[str, Tensor]:
        """Return the empty state: the squared norms window by window, `(0, in)`."""
        return {"squares": torch.zeros((0, in_features), dtype=torch.float32, device=device)}

    def update(self, state: dict[str, Tensor], x: Tensor, pruned: Tensor | None = None) -> None:
        """Add float32 `x (windows, tokens, in)`."""
        squares = x.square().sum(dim=1)
        state["squares"] = torch.cat((state["squares"], squares))

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of the windows of `a`, followed by those of `b`."""
        return {"squares": torch.cat((a["squares"], b["squares"]))}

    def result(self, state: dict[str, Tensor]) -> Tensor:
        """Return the norms `(in,)`."""
        total = state["squares"].new_zeros(state["squares"].shape[1])
        for k, square in enumerate(state["squares"], start=1):
            total += square / k
        return total.sqrt()


@dataclass(frozen=True, eq=False)
class SparseGPT:
    """Score W²/U_jj², error fed forward (Frantar and Alistarh 2023, eq. 3 and algorithm 1).

    U is the upper Cholesky factor of the inverse of the damped Gram matrix. The mask is chosen a
    slice of columns at a time, from weights that earlier slices have already moved.
    """

    damping: float = option(0.01, "added to the Gram matrix's diagonal, times its mean")
    slice: int = option(128, "columns that are masked together")
    published_code: bool = option(
        False, "weigh the k-th search window by 1/k in the input norms, as the published search"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= second_order.LARGEST_DAMPING:
            raise ValueError(f"damping {self.damping} is outside [0, 1]")
        if self.slice < 1:
            raise ValueError(f"slice {self.slice} is not a positive number")

    @hookimpl
    def describe(self) -> PrunerTraits:
        """Return that weights compete in the matrix and that survivors are moved."""
        return PrunerTraits(comparison="matrix", row_ratios=False, second_order=True)

    @hookimpl
    def required_statistics(self) -> frozenset[str | Accumulator]:
        """Return the Gram matrix, and with `published_code` the norms its search reads."""
        return frozenset({"gram", FadingNorm()} if self.published_code else {"gram"})

    @hookimpl
    def score_weights(self, weight: Tensor, statistics: Statistics, linear: Linear) -> Tensor:
        """Return W²/U_jj² of the dense weight `(out, in)`, 0 at dead inputs."""
        gram = second_order.gram_matrix(statistics, linear)
        scores = (weight / self._factor(gram, linear).diagonal()) ** 2
        return scores.masked_fill(gram.diagonal() == 0, 0)

    @hookimpl
    def prune_linear(
        self, weight: Tensor, target: Target, statistics: Statistics, linear: Linear
    ) -> PrunedLinear:
        """Prune slice by slice; under budget "paper" at least one weight more a slice.

        Weights of dead inputs go first; those that the exact budget has no room for stay as they
        are, where the published code zeroes them too.
        """
        gram = second_order.gram_matrix(statistics, linear)
        dead = gram.diagonal() == 0
        upper = self._factor(gram, linear)
        moved, mask = self._sweep(weight.masked_fill(dead, 0), upper, target)
        if target.budget == "exact":
            moved = torch.where(dead & ~mask, weight, moved)
        return PrunedLinear(moved, mask)

    def _factor(self, gram: Tensor, linear: Linear) -> Tensor:
        """Return U `(in, in)`, upper triangular, with UᵀU the inverse of the damped Gram matrix."""

        def build(damping: float) -> Tensor | None:
            diagonal = gram.diagonal()
            alive = gram + torch.diag((diagonal == 0).to(gram.dtype))
            lower = second_order.cholesky(second_order.damped(alive, damping))
            if lower is None:
                return None
            return second_order.cholesky(torch.cholesky_inverse(lower), upper=True)

        return second_order.once_per_gram(
            gram,
            ("sparsegpt", self.damping),
            lambda: second_order.climb(build, self.damping, linear),
        )

    def _sweep(self, weight: Tensor, upper: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Prune `weight` in place from left to right; return it and the mask."""
        mask = torch.zeros_like(weight, dtype=torch.bool)
        starts = range(0, weight.shape[1], self._width(target))
        slices = [slice(start, start + starts.step) for start in starts]
        widths = torch.tensor([weight[0, columns].numel() for columns in slices])
        shares = second_order.share_out(target.counts.cpu(), widths)  # (out or 1, slices)
        for columns, share in zip(slices, shares.unbind(1), strict=True):
            block = upper[columns, columns]
            chosen = mask[:, columns]
            if target.pattern is None:
                scores = weight[:, columns] ** 2 / block.diagonal() ** 2
                chosen.copy_(_slice_mask(scores, target, share))
            errors = _prune_slice(weight[:, columns], block, chosen, target)
            rest = slice(columns.stop, None)
            weight[:, rest] -= errors @ upper[columns, rest]
        return weight, mask

    def _width(self, target: Target) -> int:
        """Return the columns of a slice: whole groups, under a pattern."""
        if target.pattern is None:
            return self.slice
        return max(self.slice // target.pattern.of, 1) * target.pattern.of


def _slice_mask(scores: Tensor, target: Target, share: Tensor) -> Tensor:
    """Return which weights of a slice `(out, columns)` are pruned."""
    if target.comparison == "row":
        return row_mask(scores, share)
    if target.budget == "paper":
        n = scores.numel()
        ordered = scores.flatten().sort().values
        return scores <= ordered[min(int(n * target.ratio), n - 1)]
    return row_mask(scores.reshape(1, -1), share).reshape(scores.shape)


def _prune_slice(weight: Tensor, upper: Tensor, mask: Tensor, target: Target) -> Tensor:
    """Prune the columns of one slice in order, in place, and return their scaled errors.

    A column's error moves the columns of its own strip at once; those behind the strip are moved
    by the errors of the whole strip, in one product.

    Args:
        weight: `(out, columns)`.
        upper: The slice's diagonal block of U, `(columns, columns)`.
        mask: `(out, columns)`; under a pattern it is chosen here, a group at a time.
        target: For its pattern.
    """
    turned = weight.t().contiguous()  # (columns, out): a column lies in one piece
    diagonal = upper.diagonal()
    errors = torch.empty_like(turned)
    width = STRIP if target.pattern is None else target.pattern.of
    for start in range(0, len(turned), width):
        strip, behind = slice(start, start + width), slice(start + width, None)
        if target.pattern is not None:
            scores = turned[strip].t() ** 2 / diagonal[strip] ** 2
            mask[:, strip] = second_order.choose_mask(scores, target)
        divisors = diagonal[strip, None].where(mask[:, strip].t(), torch.inf)
        _prune_strip(turned[strip], upper[strip, strip], divisors, errors[strip])
        turned[behind].addmm_(upper[strip, behind].t(), errors[strip], alpha=-1)
    weight.copy_(turned.t())
    weight.masked_fill_(mask, 0)  # what rounding left
    return errors.t()


def _prune_strip(turned: Tensor, upper: Tensor, divisors: Tensor, errors: Tensor) -> None:
    """Prune the columns of one strip in order, in place; the errors are written to `errors`.

    Args:
        turned: The strip's weights, `(columns, out)`.
        upper: Its diagonal block of U, `(columns, columns)`.
        divisors: U_jj where a weight is pruned, infinity where it stays, `(columns, out)`.
        errors: `(columns, out)`.
    """
    rows = zip(turned, divisors, errors, upper, strict=True)
    for j, (column, divisor, error, reach) in enumerate(rows, start=1):
        torch.div(column, divisor, out=error)
        turned[j:].addr_(reach[j:], error, alpha=-1)
