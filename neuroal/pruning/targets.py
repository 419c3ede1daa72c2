"""From an allocation to targets: how many weights to prune in every linear and row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from neuroal.layout import Layout, Linear
from neuroal.pruning.allocation import Allocation, scaled_importance
from neuroal.pruning.budget import floors_and_order, largest_remainder, project
from neuroal.types import Budget, Comparison, Pattern, SparsityOver, Target


@dataclass(frozen=True)
class Rules:
    """How ratios become counts.

    Attributes:
        sparsity: Wanted ratio over the linears that `over` says.
        budget: "exact" meets it to the weight, "paper" rounds as published.
        comparison: Scores compete per row or per matrix.
        pattern: N:M or None.
        varies: N of the pattern varies per block to meet the sparsity.
        dense: Linears that stay dense, and why.
        zeros: By linear, how many weights of every row are zero and stay so, int64 `(out,)`;
            zeros of other linears may come back.
        over: "pruned", or "all" linears of the blocks.
        given: Ratios are given, and taken as they are: no projection on the budget.
    """

    sparsity: float
    budget: Budget = "exact"
    comparison: Comparison = "row"
    pattern: Pattern | None = None
    varies: bool = False
    dense: Mapping[str, str] = field(default_factory=dict)
    zeros: Mapping[str, Tensor] = field(default_factory=dict)
    over: SparsityOver = "pruned"
    given: bool = False

    def pruned(self, layout: Layout) -> list[Linear]:
        """Return the linears that are pruned, in execution order."""
        return [x for x in layout.linears.values() if x.name not in self.dense]

    def counted(self, layout: Layout) -> int:
        """Return the number of weights that the sparsity is a ratio of."""
        linears = layout.linears.values() if self.over == "all" else self.pruned(layout)
        return sum(x.weights for x in linears)

    def ratio(self, layout: Layout) -> float:
        """Return the mean ratio, over their weights, of the linears that are pruned."""
        if self.over == "pruned" or not self.dense:
            return self.sparsity
        return self.sparsity * layout.weights / sum(x.weights for x in self.pruned(layout))

    def left_dense(self, layout: Layout) -> list[str]:
        """Return a line for every reason why linears of the layout stay dense."""
        by_reason: dict[str, list[Linear]] = {}
        for x in layout.linears.values():
            if x.name in self.dense:
                by_reason.setdefault(self.dense[x.name], []).append(x)
        lines = []
        for reason, linears in by_reason.items():
            share = sum(x.weights for x in linears) / layout.weights
            more = f" and {len(linears) - 1} more" if len(linears) > 1 else ""
            of_all = f"{share:.1%} of the weights of all linears"
            lines.append(f"{reason}: {linears[0].name}{more}, {of_all}")
        return lines


def targets(
    allocation: Allocation, layout: Layout, rules: Rules, probe: bool = False
) -> dict[str, Target]:
    """Return how many weights to prune in every linear (and row).

    The ratios of a probe, and those that are given, are taken unchanged, without projection on the
    budget. No linear and no row is pruned of fewer weights than the zeros that stay.

    Returns:
        A target per linear that is pruned; under budget "exact" their counts sum to exactly
        `round(sparsity * weights)` of the linears that the sparsity is over.
    """
    linears = rules.pruned(layout)
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
    if probe or rules.given:
        ratios = ratios.maximum(lowest)
        total = _round(float((ratios * weights).sum()))
    else:
        total = _round(rules.sparsity * rules.counted(layout))
        ratios = project(ratios, weights, total / float(weights.sum()), lowest=lowest)
    counts = _rounded_above(zeros, ratios * weights, total)
    return {
        x.name: _target(allocation, x, float(r), int(c), rules)
        for x, r, c in zip(linears, ratios, counts, strict=True)
    }


def as_pruned(allocation: Allocation, layout: Layout, wanted: Mapping[str, Target]) -> Allocation:
    """Return an allocation with the ratios that its targets have: those of the budget.

    One that differs from these by less than a weight in all is returned as it is.

    Args:
        allocation: As it was chosen.
        layout: The model's.
        wanted: Its `targets`.
    """
    ratios = {name: wanted[name].ratio if name in wanted else 0.0 for name in allocation.ratios}
    if all(abs(ratios[n] - own) * layout.weights < 1 for n, own in allocation.ratios.items()):
        return allocation
    rows = dict(allocation.rows)
    for name, values in rows.items():
        if ratios[name] != allocation.ratios[name]:
            rows[name] = project(values, torch.ones_like(values), ratios[name])
    return replace(allocation, ratios=ratios, rows=rows)


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
    wanted = rules.ratio(layout)
    if rules.given:  # a block of ratio 0 stays dense, and the others have all of the budget
        dense = [b for b, ratio in enumerate(ratios.tolist()) if ratio == 0]
        wanted *= float(weights.sum()) / float(weights[ratios > 0].sum().clamp(min=1))
        weights[dense] = 0
        sizes = [0 if b in dense else size for b, size in enumerate(sizes)]
    shares = project(ratios, weights, wanted, highest) * of
    floors, order = floors_and_order(shares)
    pruned = [int(p) for p in floors]
    left = wanted * sum(sizes) * of - sum(p * n for p, n in zip(pruned, sizes, strict=True))
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
