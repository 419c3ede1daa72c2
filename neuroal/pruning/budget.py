"""From wanted ratios to counts of one budget: projection on a mean, rounding to whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from neuroal.errors import NeuroalError

HIGHEST = 0.99  # no linear is pruned beyond this unless the wanted sparsity itself is higher
_EPSILON = 1e-9  # products such as 100 * 0.58 = 57.999... are meant to be whole


def project(
    ratios: Tensor,
    weights: Tensor,
    mean: float,
    highest: float = HIGHEST,
    lowest: Tensor | float = 0.0,
) -> Tensor:
    """Shift ratios by one constant and clip them so that their weighted mean is `mean`.

    Of all ratios in [lowest, highest] with that mean these are the nearest to the given ones: they
    minimise Σ weights · (result - ratios)².

    Args:
        ratios: float64 `(n,)`, finite.
        weights: float64 `(n,)`, not negative: how many weights each ratio is a share of.
        mean: Wanted weighted mean, in [0, 1].
        highest: Largest ratio allowed, in [0, 1]; raised to `mean` and to `lowest` where these are
            larger.
        lowest: Least ratio allowed, in [0, 1]: float64 `(n,)`, or one for all.

    Returns:
        float64 `(n,)` in [lowest, highest], the argument itself where it already fits.

    Raises:
        NeuroalError: There is no ratio, the tensors differ in shape or are not float64, a ratio is
            not finite, a weight is negative or all are 0, or `mean` is not in [0, 1] or below that
            of `lowest`.
    """
    _check(ratios, weights, mean)
    highest = max(highest, mean)
    share = weights / weights.sum()
    lower = torch.as_tensor(lowest, dtype=torch.float64).expand_as(ratios)
    upper = lower.clamp(min=highest)
    if float((lower * share).sum()) > mean + _EPSILON:
        raise NeuroalError(f"mean {mean} is below that of the least ratios allowed")

    def excess(shift: float) -> float:
        return float(((ratios + shift).clamp(lower, upper) * share).sum()) - mean

    inside = bool(((ratios >= lower) & (ratios <= upper)).all())
    if inside and abs(excess(0.0)) < 1e-12:
        return ratios
    low, high = -float(ratios.max()), highest - float(ratios.min())
    for _ in range(200):  # bisection to the last bit: the excess grows with the shift
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (ratios + high).clamp(lower, upper)


def _check(ratios: Tensor, weights: Tensor, mean: float) -> None:
    if ratios.dim() != 1 or ratios.shape != weights.shape or not len(ratios):
        shapes = f"{tuple(ratios.shape)} and {tuple(weights.shape)}"
        raise NeuroalError(f"ratios and weights have shapes {shapes}, not (n,) both")
    if {ratios.dtype, weights.dtype} != {torch.float64}:
        dtypes = f"{ratios.dtype} and {weights.dtype}"
        raise NeuroalError(f"ratios and weights are {dtypes}, not float64")
    if not bool(ratios.isfinite().all()):
        raise NeuroalError("a ratio is not finite")
    if not bool((weights >= 0).all()) or not bool(weights.any()):
        raise NeuroalError("weights are negative, or all 0")
    if not 0 <= mean <= 1:
        raise NeuroalError(f"mean {mean} is not in [0, 1]")


def largest_remainder(shares: Tensor, total: int | Tensor) -> Tensor:
    """Round shares to whole counts of a given sum; the largest remainders go up, first on ties.

    Args:
        shares: float64 `(n,)` or `(rows, n)`, not negative, of sum within a half of `total`;
            remainders that differ by less than 1e-9 are equal.
        total: Wanted sum; int64 `(rows,)` for shares in rows.

    Returns:
        int64 of the same shape, each within one of its share.
    """
    floors, order = floors_and_order(shares)
    counts = floors.to(torch.int64)
    left = torch.as_tensor(total) - counts.sum(dim=-1)  # how many go up, in each row
    return counts + (order.argsort(dim=-1) < left[..., None])


def floors_and_order(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the whole part of shares `(..., n)`, and their indices from the largest remainder."""
    floors = (shares + _EPSILON).floor()
    remainders = ((shares - floors) / _EPSILON).round()
    return floors, remainders.argsort(dim=-1, descending=True, stable=True)
