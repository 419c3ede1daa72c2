"""From an allocation to targets: how many weights to prune in every linear and row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuroal.layout import Layout, Linear
from neuroal.pruning.allocation import Allocation, scaled_importance
from neuroal.pruning.budget import floors_and_order, largest_remainder, project
from neuroal.types import Budget, Comparison, Pattern, Target


@dataclass(frozen=True)
class Rules:
    """How ratios become counts.

    Attributes:
        sparsity: Wanted ratio over the prunable weights.
        budget: "exact" meets it to the weight, "paper" rounds as published.
        comparison: Scores compete per row or per matrix.
        pattern: N:M or None.
        varies: N of the pattern varies per block to meet the sparsity.
        dense: Linears that stay dense (inputs that M does not divide).
        zeros: By linear, how many weights of every row are zero and stay so, int64 `(out,)`;
            zeros of other linears may come back.
    """

    sparsity: float
    budget: Budget = "exact"
    comparison: Comparison = "row"
    pattern: Pattern | None = None
    varies: bool = False
    dense: frozenset[str] = frozenset()
    zeros: Mapping[str, Tensor] = field(default_factory=dict)

    def left_dense(self, layout: Layout) -> list[str]:
        """Return one line that says what the pattern leaves dense; empty if nothing."""
        names = [name for name in layout.linears if name in self.dense]
        if not names:
            return []
        share = sum(layout.linears[name].weights for name in names) / layout.weights
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return [
            f"pattern {self.pattern} does not divide the inputs: {names[0]}{more}, {share:.1%} of "
            f"the weights of all linears"
        ]


def targets(
    allocation: Allocation, layout: Layout, rules: Rules, probe: bool = False
) -> dict[str, Target]:
    """Return how many weights to prune in every linear (and row).

    A probe's ratios are taken unchanged, without projection on the budget. No linear and no row is
    pruned of fewer weights than the zeros that stay.

    Returns:
        A target per linear that is pruned; under budget "exact" their counts sum to exactly
        `round(sparsity * prunable weights)`.
    """
    linears = [x for x in layout.linears.values() if x.name not in rules.dense]
    if rules.pattern is not None:
        return _pattern_targets(allocation, layout, linears, rules, probe)
    if rules.budget == "paper":
        own = allocation.ratios
        return {
            x.name: _target(
                allocation,
                x,
                own[x.name],
                max(int(x.weights * own[x.name]), _zeros(x, rules)),
                rules,
            )
            for x in linears
        }
    weights = torch.tensor([x.weights for x in linears], dtype=torch.float64)
    ratios = torch.tensor([allocation.ratios[x.name] for x in linears], dtype=torch.float64)
    zeros = torch.tensor([_zeros(x, rules) for x in linears])
    lowest = zeros / weights
    if probe:
        ratios = ratios.maximum(lowest)
        total = _round(float((ratios * weights).sum()))
    else:
        total = _round(rules.sparsity * float(weights.sum()))
        ratios = project(ratios, weights, total / float(weights.sum()), lowest=lowest)
    counts = _rounded_above(zeros, ratios * weights, total)
    return {
        x.name: _target(allocation, x, float(r), int(c), rules)
        for x, r, c in zip(linears, ratios, counts, strict=True)
    }


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def _zeros(linear: Linear, rules: Rules) -> int:
    """Return how many weights of a linear are zero and stay so."""
    rows = rules.zeros.get(linear.name)
    return 0 if rows is None else int(rows.sum())


def _rounded_above(least: Tensor, shares: Tensor, total: int) -> Tensor:
    """Round shares to whole counts of sum `total`, none of them below its least, int64 `(n,)`."""
    return least + largest_remainder((shares - least).clamp(min=0), total - int(least.sum()))


def _target(
    allocation: Allocation, linear: Linear, ratio: float, count: int, rules: Rules
) -> Target:
    """Return the target of a linear of which `count` weights are pruned, unless rows say more."""
    if rules.comparison == "matrix" or linear.name in allocation.importance:
        counts = torch.tensor([count])
        importance = scaled_importance(allocation.importance.get(linear.name))
        return Target(counts, ratio, None, "matrix", rules.budget, importance=importance)
    rows = allocation.rows.get(linear.name)  # (out,)
    zeros = rules.zeros.get(linear.name)  # (out,)
    if rules.budget == "exact":
        return Target(_exact_counts(linear, count, rows, zeros), ratio, None, "row", "exact")
    counts = _paper_counts(linear, ratio, rows)
    counts = counts if zeros is None else counts.maximum(zeros)
    return Target(counts, ratio, None, "row", "paper", prune_last=rows is not None)


def _exact_counts(linear: Linear, count: int, rows: Tensor | None, zeros: Tensor | None) -> Tensor:
    """Return counts `(out,)` of sum `count`, all alike or in proportion to the rows' ratios.

    None is below the row's zeros.
    """
    n = linear.out_features
    if rows is None and zeros is None:
        return largest_remainder(torch.full((n,), count / n, dtype=torch.float64), count)
    mean, ones = count / linear.weights, torch.ones(n, dtype=torch.float64)
    least = torch.zeros(n, dtype=torch.int64) if zeros is None else zeros
    wanted = mean * ones if rows is None else rows
    ratios = project(wanted, ones, mean, lowest=least.double() / linear.in_features)
    return _rounded_above(least, ratios * linear.in_features, count)


def _paper_counts(linear: Linear, ratio: float, rows: Tensor | None) -> Tensor:
    """The published roundings: int(d r) pruned per row, or int(d (1 - r_i)) kept per row."""
    d = linear.in_features
    if rows is None:
        return torch.full((linear.out_features,), int(d * ratio))
    return d - ((1 - rows) * d).floor().to(torch.int64)


def _pattern_targets(
    allocation: Allocation,
    layout: Layout,
    linears: Sequence[Linear],
    rules: Rules,
    probe: bool,
) -> dict[str, Target]:
    """N:M with one N, or with an N per block that meets the sparsity to one step."""
    assert rules.pattern is not None
    of = rules.pattern.of
    pruned = [of - rules.pattern.kept] * len(layout.blocks)
    if rules.varies:
        pruned = _pruned_per_group(allocation, layout, linears, rules, of, probe)
    result = {}
    for x in linears:
        p = pruned[x.block]
        counts = torch.full((x.out_features,), p * (x.in_features // of))
        result[x.name] = Target(counts, p / of, Pattern(of - p, of), "row", rules.budget)
    return result


def _pruned_per_group(
    allocation: Allocation,
    layout: Layout,
    linears: Sequence[Linear],
    rules: Rules,
    of: int,
    probe: bool,
) -> list[int]:
    """Weights pruned of every M in each block; their mean is the sparsity to one step."""
    sizes = [sum(x.weights for x in linears if x.block == b.index) for b in layout.blocks]
    weights = torch.tensor(sizes, dtype=torch.float64)
    ratios = torch.zeros_like(weights)
    for x in linears:
        ratios[x.block] += allocation.ratios[x.name] * x.weights
    ratios = ratios / weights.clamp(min=1)
    highest = (of - 1) / of
    if probe:
        return [_round(r * of) for r in ratios.clamp(max=highest).tolist()]
    shares = project(ratios, weights, rules.sparsity, highest) * of
    floors, order = floors_and_order(shares)
    pruned = [int(p) for p in floors]
    left = rules.sparsity * sum(sizes) * of - sum(p * n for p, n in zip(pruned, sizes, strict=True))
    for b in order.tolist():
        if left > sizes[b] / 2 and pruned[b] < of - 1:
            pruned[b] += 1
            left -= sizes[b]
    # Blocks of unequal size: steps of smaller ones reduce the rest that a larger one left.
    while moves := [
        (abs(left - step * sizes[b]), b, step)
        for b, p in enumerate(pruned)
        for step in (1, -1)
        if 0 <= p + step < of and abs(left - step * sizes[b]) < abs(left) - 1e-9
    ]:
        _, b, step = min(moves)
        pruned[b] += step
        left -= step * sizes[b]
    return pruned
