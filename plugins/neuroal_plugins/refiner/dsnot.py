"""DSnoT: exchange pruned for kept weights until a row's expected output error is small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Linear, RefinerTraits, Statistics, Target, hookimpl, option


@dataclass(frozen=True, eq=False)
class Dsnot:
    """Training-free grow and prune of a mask (Zhang et al. 2024, Dynamic Sparse No Training, §3).

    With C_ij = W_ij * s_j, the error of a row is the sum of C over its pruned weights. Each cycle
    grows the weight of largest C / v^γ of the error's sign and prunes the one of least Wanda
    score of the other sign.
    """

    gamma: float = option(1.0, "power of the input variance that divides the grow criterion")
    cycles: int = option(50, "exchanges per row at most")
    threshold: float = option(0.1, "a row is done when its error is not above this")
    attention_only: bool = option(True, "refine only the linears of the attention")
    published_code: bool = option(
        False, "go on exchanging in finished rows, as the published loop; needs --budget paper"
    )

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise ValueError(f"gamma {self.gamma} is negative")
        if self.cycles < 0:
            raise ValueError(f"cycles {self.cycles} is negative")
        if self.threshold < 0:
            raise ValueError(f"threshold {self.threshold} is negative")

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the norms, sums and variances of the inputs."""
        return frozenset({"input_norm", "input_sum", "input_var"})

    @hookimpl
    def describe(self) -> RefinerTraits:
        """Return that rows drift with `published_code`."""
        why = "dsnot.published_code prunes more than it is asked for"
        return RefinerTraits(needs_paper_budget=why if self.published_code else "")

    @hookimpl
    def refine_mask(
        self, weight: Tensor, mask: Tensor, target: Target, statistics: Statistics, linear: Linear
    ) -> Tensor:
        """Return a mask with as many weights pruned in every row and every N:M group.

        With `published_code`, and without a pattern, rows drift towards more pruned weights.
        """
        if self.attention_only and linear.part != "attention":
            return mask
        criterion = weight * statistics["input_sum"]  # C, (out, in)
        wanda = weight.abs() * statistics["input_norm"]
        grow = grow_list(criterion, mask, statistics["input_var"], self.gamma)
        if target.pattern is not None:
            return self._exchange_in_groups(criterion, wanda, mask, grow, target.pattern.of)
        return self._exchange(criterion, mask, grow, prune_list(criterion, wanda, mask))

    def _exchange(self, criterion: Tensor, mask: Tensor, grow: Tensor, prune: Tensor) -> Tensor:
        """Return the mask after the cycles, all rows together; the lists hold `(out, in)` columns.

        A row stops at the end of a list: only kept weights are left to grow, or none to prune.
        """
        refined, error = mask.clone(), _error(criterion, mask)
        kept = (~mask).sum(1, keepdim=True)
        grow_at, prune_at = _ends(torch.full_like(kept, mask.shape[1])), _ends(kept)
        active = torch.ones_like(error, dtype=torch.bool)
        for cycle in range(self.cycles):
            if (self.published_code or _looks(cycle, active)) and not bool(active.any()):
                break
            active = active & (error.abs() > self.threshold)
            positive, negative = error > 0, error < 0
            grown, grow_place = _take(grow, grow_at, positive)
            pruned, prune_place = _take(prune, prune_at, negative)
            if self.published_code:
                writes = (grow_place < mask.shape[1]) & (prune_place < kept)
                writes &= (grow_place >= 0) & (prune_place >= 0)
                active = active & writes
            else:
                active = active & _apart(grow_at) & _apart(prune_at) & mask.gather(1, grown)
                writes = active
            _write(refined, pruned, active, writes)
            _write(refined, grown, ~active, writes)
            error = error + _change(criterion, pruned, grown, active)
            grow_at, prune_at = _advance(grow_at, positive), _advance(prune_at, negative)
        return refined

    def _exchange_in_groups(
        self, criterion: Tensor, wanda: Tensor, mask: Tensor, grow: Tensor, of: int
    ) -> Tensor:
        """Return the N:M mask after the cycles; each exchange stays within a group of `of`.

        The cheapest weight that is kept from the start goes; where a group has none left, the
        cycle passes. What the published loop does to finished rows would break the pattern.
        """
        refined, error = mask.clone(), _error(criterion, mask)
        price = wanda.masked_fill(mask, torch.inf)  # of what may still be pruned
        grow_at = _ends(torch.full_like(error, mask.shape[1], dtype=torch.long))
        places = torch.arange(of, device=mask.device)
        active = torch.ones_like(error, dtype=torch.bool)
        for cycle in range(self.cycles):
            if _looks(cycle, active) and not bool(active.any()):
                break
            active = active & (error.abs() > self.threshold)
            positive = error > 0
            grown, _place = _take(grow, grow_at, positive)
            active = active & _apart(grow_at) & mask.gather(1, grown)
            group = grown - grown % of + places  # (out, of)
            prices, cheapest = price.gather(1, group).min(1, keepdim=True)
            pruned = group.gather(1, cheapest)
            moves = active & prices.isfinite()
            price.scatter_(1, pruned, prices.masked_fill(moves, torch.inf))
            _write(refined, pruned, moves, moves)
            _write(refined, grown, ~moves, moves)
            error = error + _change(criterion, pruned, grown, moves)
            grow_at = _advance(grow_at, positive)
        return refined


def grow_list(criterion: Tensor, mask: Tensor, variance: Tensor, gamma: float) -> Tensor:
    """Return the columns of every row by C / v^γ ascending, kept weights counting as 0.

    Args:
        criterion: C, `(out, in)`.
        mask: bool `(out, in)`, True = pruned.
        variance: v, `(in,)`; where it is 0 a C of 0 counts as 0, another as infinite.
        gamma: γ >= 0.

    Returns:
        int64 `(out, in)`.
    """
    scaled = (criterion / variance**gamma).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return scaled.masked_fill(~mask, 0).argsort(dim=1, stable=True)


def prune_list(criterion: Tensor, wanda: Tensor, mask: Tensor) -> Tensor:
    """Return the columns of every row: first the kept weights, in the order of pruning.

    Those of negative C by ascending Wanda score, those of zero C, those of positive C by descending
    score; then the pruned weights, which are not to be read.

    Args:
        criterion: C, `(out, in)`.
        wanda: |W| * n, `(out, in)`.
        mask: bool `(out, in)`, True = pruned.

    Returns:
        int64 `(out, in)`.
    """
    width = mask.shape[1]
    cheapest = wanda.argsort(dim=1, stable=True)
    signs = criterion.gather(1, cheapest).sign().long()
    place = torch.arange(width, device=mask.device).expand_as(signs)
    key = torch.where(signs > 0, 3 * width - place, place + width * (signs + 1))
    key = key.masked_fill(mask.gather(1, cheapest), 4 * width)
    return cheapest.gather(1, key.argsort(dim=1, stable=True))


def _error(criterion: Tensor, mask: Tensor) -> Tensor:
    """Return ε, the sum of C over the pruned weights of every row, `(out, 1)`."""
    return criterion.masked_fill(~mask, 0).sum(1, keepdim=True)


def _change(criterion: Tensor, pruned: Tensor, grown: Tensor, moves: Tensor) -> Tensor:
    """Return C(pruned) - C(grown) of the rows that move, `(out, 1)`."""
    return (criterion.gather(1, pruned) - criterion.gather(1, grown)).masked_fill(~moves, 0)


def _looks(cycle: int, active: Tensor) -> bool:
    """Return whether to look if rows are active: on a device, which is then waited for, rarely.

    A cycle without an active row changes nothing.
    """
    return active.device.type == "cpu" or cycle & (cycle - 1) == 0  # 0, 1, 2, 4, 8, ...


def _ends(length: Tensor) -> Tensor:
    """Return the pointers at both ends of lists, `(out, 2)`, for lengths `(out, 1)`."""
    return torch.cat((torch.zeros_like(length), length - 1), dim=1)


def _take(order: Tensor, at: Tensor, from_end: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column under one of the two pointers of every row, and its place, `(out, 1)`."""
    place = at.gather(1, from_end.long())
    return order.gather(1, place.clamp(0, order.shape[1] - 1)), place


def _apart(at: Tensor) -> Tensor:
    """Return in which rows the two pointers have not passed each other, `(out, 1)`."""
    return at[:, :1] <= at[:, 1:]


def _advance(at: Tensor, from_end: Tensor) -> Tensor:
    """Return the pointers after a step of the one that was used."""
    return at + torch.cat(((~from_end).long(), -from_end.long()), dim=1)


def _write(mask: Tensor, column: Tensor, values: Tensor, where: Tensor) -> None:
    """Set one entry of every row in place, in the rows `where` it is to be written."""
    mask.scatter_(1, column, torch.where(where, values, mask.gather(1, column)))
