"""SparseGPT: prune column by column and let the columns to the right make up for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

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
    largest_remainder,
    option,
)
from neuroal_plugins import second_order

STRIP = 16  # columns whose errors move all later columns in one product
COLUMNAR = 0.5  # relative range of the slices' losses above which ROSE moves them


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
    order: Literal["natural", "rose"] = option(
        "natural", "of the columns; rose: those of most expected loss first (not with N:M)"
    )
    published_code: bool = option(
        False,
        "weigh the k-th window by 1/k in input norms, as the published search; dsnot reads them",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= second_order.LARGEST_DAMPING:
            raise ValueError(f"damping {self.damping} is outside [0, 1]")
        if self.slice < 1:
            raise ValueError(f"slice {self.slice} is not a positive number")

    @hookimpl
    def describe(self) -> PrunerTraits:
        """Return that weights compete in the matrix; in N:M groups too, in the natural order."""
        patterns = self.order == "natural"
        return PrunerTraits(comparison="matrix", row_ratios=False, patterns=patterns)

    @hookimpl
    def required_statistics(self) -> frozenset[str | Accumulator]:
        """Return the Gram matrix, and with `published_code` the norms its search reads."""
        return frozenset({"gram", FadingNorm()} if self.published_code else {"gram"})

    @hookimpl
    def score_weights(self, weight: Tensor, statistics: Statistics, linear: Linear) -> Tensor:
        """Return W²/U_jj² of the dense weight `(out, in)`, 0 at dead inputs."""
        upper, dead = self._factors([statistics], [linear])
        scores = (weight / upper[0].diagonal()) ** 2
        return scores.masked_fill(dead[0], 0)

    @hookimpl
    def prune_linears(
        self,
        weights: Tensor,
        targets: Sequence[Target],
        statistics: Sequence[Statistics],
        linears: Sequence[Linear],
    ) -> list[PrunedLinear]:
        """Prune slice by slice; under budget "paper" at least one weight more a slice.

        Weights of dead inputs go first; those that the exact budget has no room for stay as they
        are, where the published code zeroes them too.
        """
        if self.order == "rose":
            return self._prune_reordered(weights, targets, statistics, linears)
        upper, dead = self._factors(statistics, linears)
        dead = dead[:, None]  # (n, 1, in)
        moved, masks = self._sweep(weights.masked_fill(dead, 0), upper, targets)
        if targets[0].budget == "exact":
            moved = torch.where(dead & ~masks, weights, moved)
        return [PrunedLinear(*answer) for answer in zip(moved, masks, strict=True)]

    def _prune_reordered(
        self,
        weights: Tensor,
        targets: Sequence[Target],
        statistics: Sequence[Statistics],
        linears: Sequence[Linear],
    ) -> list[PrunedLinear]:
        """Prune the columns of every linear in ROSE's order, and put them back in their places."""
        grams = [known["gram"] for known in statistics]
        norms = torch.stack([gram.diagonal() for gram in grams]).sqrt()
        orders = rose_order(weights, norms, targets, self.slice)
        natural = torch.arange(weights.shape[2], device=weights.device)
        answers = replace(self, order="natural").prune_linears(
            weights.gather(2, orders[:, None].expand_as(weights)),
            [
                target if target.zeros is None else replace(target, zeros=target.zeros[:, order])
                for target, order in zip(targets, orders, strict=True)
            ],
            [
                # Linears that keep their order go on sharing one Gram matrix, and its factor.
                Statistics({"gram": gram if order.equal(natural) else gram[order][:, order]})
                for gram, order in zip(grams, orders, strict=True)
            ],
            linears,
        )
        return [
            PrunedLinear(answer.weight[:, back], answer.mask[:, back])
            for answer, back in zip(answers, orders.argsort(1), strict=True)
        ]

    def _factors(
        self, statistics: Sequence[Statistics], linears: Sequence[Linear]
    ) -> tuple[Tensor, ...]:
        """Return U `(n, in, in)` and which inputs are dead, bool `(n, in)`.

        U is upper triangular, with UᵀU the inverse of the damped Gram matrix.
        """
        key = ("sparsegpt", self.damping)
        return second_order.factors(self._factor, key, statistics, linears)

    def _factor(self, gram: Tensor, linear: Linear) -> tuple[Tensor, Tensor]:
        dead = gram.diagonal() == 0
        alive = gram + torch.diag(dead.to(gram.dtype))

        def build(damping: float) -> Tensor | None:
            lower = second_order.cholesky(second_order.damped(alive, damping))
            if lower is None:
                return None
            return second_order.cholesky(torch.cholesky_inverse(lower), upper=True)

        return second_order.climb(build, self.damping, linear), dead

    def _sweep(
        self, weights: Tensor, upper: Tensor, targets: Sequence[Target]
    ) -> tuple[Tensor, Tensor]:
        """Prune `(n, out, in)` from left to right; return the new weights and their masks."""
        target, zeros = targets[0], second_order.zeros_of(targets, weights)
        turned = weights.mT.contiguous()  # (n, in, out): a column lies in one piece
        masks = torch.zeros_like(weights, dtype=torch.bool)
        for columns, share in _shares(weights, targets, self._width(target)):
            block, rest = upper[:, columns, columns], slice(columns.stop, None)
            chosen = masks[..., columns]
            stays = None if zeros is None else zeros[..., columns]
            if target.pattern is None:
                scores = _saliencies(turned[:, columns], block)
                chosen.copy_(_slice_masks(scores, share, targets, stays))
            errors = _prune_slice(turned[:, columns], block, chosen, target, stays)
            turned[:, rest].baddbmm_(upper[:, columns, rest].mT, errors, alpha=-1)
        return turned.mT.contiguous().masked_fill_(masks, 0), masks  # 0 but for rounding

    def _width(self, target: Target) -> int:
        """Return the columns of a slice: whole groups, under a pattern."""
        if target.pattern is None:
            return self.slice
        return max(self.slice // target.pattern.of, 1) * target.pattern.of


def rose_order(weights: Tensor, norms: Tensor, targets: Sequence[Target], width: int) -> Tensor:
    """Return the columns in the order in which ROSE prunes them (Su and Wang 2026).

    The loss of a column is the sum of the Wanda scores that would be pruned of it, if every slice
    were pruned by them. Within a slice, columns go in the order of falling loss, and slices too. A
    linear whose slices differ by at most half of the largest loss keeps its order; a last slice
    that is narrower than the others stays the last.

    Args:
        weights: float32 `(n, out, in)`.
        norms: Of the inputs, up to a factor, `(n, in)`.
        targets: One a linear.
        width: Columns of a slice.

    Returns:
        int64 `(n, in)`.
    """
    scores = weights.abs() * norms[:, None]
    zeros = second_order.zeros_of(targets, weights)
    natural = torch.arange(weights.shape[2], device=weights.device)
    losses = torch.zeros_like(norms)
    for columns, share in _shares(weights, targets, width):
        part = scores[..., columns]
        stays = None if zeros is None else zeros[..., columns]
        losses[:, columns] = (part * _slice_masks(part, share, targets, stays)).sum(1)
    whole = weights.shape[2] // width * width
    if whole == 0:
        return natural.expand_as(losses)
    by_slice = losses[:, :whole].reshape(len(losses), -1, width)  # (n, slices, width)
    totals = by_slice.sum(2)
    slices = totals.argsort(dim=1, descending=True, stable=True)[..., None]
    within = by_slice.argsort(dim=2, descending=True, stable=True)
    order = (within + natural[:whole:width, None]).gather(1, slices.expand_as(within)).flatten(1)
    most, least = totals.amax(1, keepdim=True), totals.amin(1, keepdim=True)
    moved = torch.cat((order, natural[whole:].expand(len(order), -1)), 1)
    return torch.where(most - least > COLUMNAR * most, moved, natural)


def _shares(
    weights: Tensor, targets: Sequence[Target], width: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the slices of weights `(n, out, in)`, and how many weights go from each.

    The counts are of every matrix, or of every row of it, on the CPU. Zeros that stay count where
    they are; of the other weights, all slices lose the same share.
    """
    starts = range(0, weights.shape[2], width)
    slices = [slice(start, min(start + width, weights.shape[2])) for start in starts]
    widths = torch.tensor([columns.stop - columns.start for columns in slices])
    counts = second_order.counts_of(targets, weights.shape[1]).flatten().cpu()
    zeros = second_order.zeros_of(targets, weights)
    if zeros is None:
        shares = counts.double()[:, None] * widths / widths.sum()  # (rows, slices)
        yield from zip(slices, largest_remainder(shares, counts).unbind(1), strict=True)
        return
    rows = zeros.reshape(len(counts), -1, weights.shape[2]).sum(1).cpu()  # (rows, in)
    there = torch.stack([rows[:, columns].sum(1) for columns in slices], dim=1)  # (rows, slices)
    others = widths * (zeros[..., 0].numel() // len(counts)) - there
    left = (counts - there.sum(1)).clamp(min=0)  # below 0 only where a pattern decides
    shares = left.double()[:, None] * others / others.sum(1, keepdim=True).clamp(min=1)
    yield from zip(slices, (there + largest_remainder(shares, left)).unbind(1), strict=True)


def _saliencies(turned: Tensor, upper: Tensor) -> Tensor:
    """Return W²/U_jj² `(n, out, columns)` of weights `(n, columns, out)`."""
    return turned.mT**2 / upper.diagonal(dim1=1, dim2=2)[:, None] ** 2


def _slice_masks(
    scores: Tensor, share: Tensor, targets: Sequence[Target], zeros: Tensor | None
) -> Tensor:
    """Return which weights of a slice `(n, out, columns)` are pruned, `zeros` before others."""
    target = targets[0]
    if target.comparison == "row" or target.budget == "exact":
        return second_order.choose_masks(scores, share, target, zeros)
    if zeros is not None:
        scores = scores.masked_fill(zeros, -torch.inf)
    ordered = scores.flatten(1).sort(dim=1).values
    size = ordered.shape[1]
    places = torch.tensor([[min(int(size * t.ratio), size - 1)] for t in targets])
    return scores <= ordered.gather(1, places.to(ordered.device))[..., None]


def _prune_slice(
    turned: Tensor, upper: Tensor, masks: Tensor, target: Target, zeros: Tensor | None
) -> Tensor:
    """Prune the columns of one slice in order, in place, and return their scaled errors.

    A column's error moves the columns of its own strip at once; those after the strip are moved
    by the errors of the whole strip, in one product.

    Args:
        turned: The slice's weights, `(n, columns, out)`.
        upper: The slice's diagonal block of U, `(n, columns, columns)`.
        masks: `(n, out, columns)`; under a pattern they are chosen here, a group at a time.
        target: For its pattern.
        zeros: bool `(n, out, columns)`, weights that are zero and stay so, if any do.
    """
    diagonal = upper.diagonal(dim1=1, dim2=2)
    errors = torch.empty_like(turned)
    width = STRIP if target.pattern is None else target.pattern.of
    for start in range(0, turned.shape[1], width):
        strip, after = slice(start, start + width), slice(start + width, None)
        block = upper[:, strip, strip]
        if target.pattern is not None:
            scores = _saliencies(turned[:, strip], block)
            stays = None if zeros is None else zeros[..., strip]
            masks[..., strip] = second_order.choose_masks(scores, target.counts, target, stays)
        divisors = diagonal[:, strip, None].where(masks[..., strip].mT, torch.inf)
        _prune_strip(turned[:, strip], block, divisors, errors[:, strip])
        turned[:, after].baddbmm_(upper[:, strip, after].mT, errors[:, strip], alpha=-1)
    return errors


def _prune_strip(turned: Tensor, upper: Tensor, divisors: Tensor, errors: Tensor) -> None:
    """Prune the columns of one strip in order, in place; their errors are written to `errors`.

    Every column moves the whole strip: U is 0 to its left, and that costs less than views do.

    Args:
        turned: The strip's weights, `(n, columns, out)`.
        upper: Its diagonal block of U, `(n, columns, columns)`.
        divisors: U_jj where a weight is pruned, infinity where it stays, `(n, columns, out)`.
        errors: `(n, columns, out)`.
    """
    reaches = upper[..., None].unbind(1)  # (n, columns, 1) each
    parts = (x.unsqueeze(1).unbind(2) for x in (turned, divisors, errors))  # (n, 1, out) each
    for column, divisor, error, reach in zip(*parts, reaches, strict=True):
        torch.div(column, divisor, out=error)
        turned.addcmul_(reach, error, value=-1)
