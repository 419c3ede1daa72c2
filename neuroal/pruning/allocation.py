"""Ratios to exact counts: allocations, projection on the budget, targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from neuroal.errors import NeuroalError
from neuroal.layout import Layout, Linear
from neuroal.model.files import load_tensors
from neuroal.types import Budget, Comparison, Pattern, Target

FILE = "allocation.safetensors"
IMPORTANCE, INPUTS = ":importance", ":input_importance"
FURTHEST = 1e12  # between the importance of two rows: float32 scores of both are told apart
HIGHEST = 0.99  # no linear is pruned beyond this unless the wanted sparsity itself is higher
_EPSILON = 1e-9  # products such as 100 * 0.58 = 57.999... are meant to be whole


@dataclass(frozen=True, eq=False)
class Allocation:
    """Ratios per linear and, after a row step, per row.

    Attributes:
        ratios: Wanted ratio of every linear, in [0, 1].
        rows: float64 `(out,)` per linear; empty without a row step.
        row_importance: float64 `(out,)` of the linears whose rows compete for its ratio; empty
            without a row step that weighs rows.
        input_importance: float64 `(in,)` of those linears among them whose inputs are weighed.
    """

    ratios: Mapping[str, float]
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    row_importance: Mapping[str, Tensor] = field(default_factory=dict)
    input_importance: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ratios: Mapping[str, float | Tensor],
        layout: Layout,
        row_importance: Mapping[str, Tensor] | None = None,
        input_importance: Mapping[str, Tensor] | None = None,
    ) -> Allocation:
        """Return the allocation of a proposal's ratios, checked against the layout.

        Raises:
            NeuroalError: A linear is missing or unknown, a ratio is outside [0, 1], a row tensor
                has the wrong shape, importance is not positive, finite and within `FURTHEST`, or
                inputs have it where rows have none.
        """
        linears = layout.linears
        wrong = linears.keys() ^ ratios.keys()
        if wrong:
            raise NeuroalError(f"allocation and model differ in linear '{min(wrong)}'")
        by_row = any(isinstance(r, Tensor) and r.dim() for r in ratios.values())
        means: dict[str, float] = {}
        rows: dict[str, Tensor] = {}
        for name, linear in linears.items():
            ratio = ratios[name]
            values = torch.as_tensor(ratio, dtype=torch.float64).detach().cpu()
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise NeuroalError(f"ratio of '{name}' is not in [0, 1]")
            if values.dim() and values.shape != (linear.out_features,):
                raise NeuroalError(
                    f"ratios of '{name}' have shape {tuple(values.shape)}, not "
                    f"({linear.out_features},)"
                )
            means[name] = float(values.mean())
            if by_row:
                rows[name] = values.expand(linear.out_features).clone()
        weighed, inputs = row_importance or {}, input_importance or {}
        unknown = (weighed.keys() | inputs.keys()) - linears.keys()
        if unknown:
            raise NeuroalError(f"allocation and model differ in linear '{min(unknown)}'")
        alone = inputs.keys() - weighed.keys()
        if alone:
            raise NeuroalError(
                f"inputs of '{min(alone)}' have importance and its rows have none: give them ones"
            )
        importance = {
            name: _importance(f"'{name}'", given, linears[name].out_features)
            for name, given in weighed.items()
        }
        of_inputs = {
            name: _importance(f"inputs of '{name}'", given, linears[name].in_features)
            for name, given in inputs.items()
        }
        if by_row and importance:
            raise NeuroalError("an allocation has ratios of rows or importance of rows, not both")
        return cls(means, rows, importance, of_inputs)


def _importance(whose: str, given: Tensor, size: int) -> Tensor:
    """Return the importance of a linear's rows or inputs, checked, float64 on the CPU."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise NeuroalError(f"importance of {whose} is {kind}, not a floating tensor")
    values = given.detach().to("cpu", torch.float64, copy=True)
    if values.shape != (size,):
        raise NeuroalError(f"importance of {whose} has shape {tuple(values.shape)}, not ({size},)")
    problem = importance_problem(values)
    if problem is not None:
        raise NeuroalError(f"importance of {whose} {problem}")
    return values


def importance_problem(values: Tensor) -> str | None:
    """Return what is wrong with the importance of rows or inputs; None if nothing is.

    Args:
        values: Floating `(out,)` or `(in,)`, of one linear.
    """
    if not bool((values.isfinite() & (values > 0)).all()):
        return "is not positive and finite"
    least, most = float(values.min()), float(values.max())
    if most / FURTHEST > least:
        return f"is from {least:.3g} to {most:.3g}, further apart than a factor of {FURTHEST:g}"
    return None


def scaled_importance(values: Tensor | None) -> Tensor | None:
    """Return importance, float32, by the power of two that brings the largest to [1/2, 1).

    Only proportions count; so no score or weight overflows by it, and none loses a bit. None where
    all rows or inputs count alike, which is the plain matrix.

    Args:
        values: float64, of rows or inputs, in which `importance_problem` finds nothing.
    """
    if values is None or bool((values == values[0]).all()):
        return None
    exponent = math.frexp(float(values.max()))[1]
    return (values / math.ldexp(1, exponent - 1) / 2).float()


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
    """

    sparsity: float
    budget: Budget = "exact"
    comparison: Comparison = "row"
    pattern: Pattern | None = None
    varies: bool = False
    dense: frozenset[str] = frozenset()

    def left_dense(self, layout: Layout) -> list[str]:
        """Return what the pattern leaves dense, in one line if anything."""
        names = [name for name in layout.linears if name in self.dense]
        if not names:
            return []
        share = sum(layout.linears[name].weights for name in names) / layout.weights
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return [
            f"pattern {self.pattern} does not divide the inputs: {names[0]}{more}, {share:.1%} of "
            f"the weights of all linears"
        ]


def project(ratios: Tensor, weights: Tensor, mean: float, highest: float = HIGHEST) -> Tensor:
    """Shift ratios by one constant and clip them so that their weighted mean is `mean`.

    Args:
        ratios: float64 `(n,)`.
        weights: float64 `(n,)`, positive.
        mean: Wanted weighted mean in [0, 1).
        highest: Largest ratio allowed; raised to `mean` if that is larger.

    Returns:
        float64 `(n,)` in [0, highest], the argument itself where it already fits.
    """
    highest = max(highest, mean)
    share = weights / weights.sum()

    def excess(shift: float) -> float:
        return float(((ratios + shift).clamp(0, highest) * share).sum()) - mean

    inside = bool(((ratios >= 0) & (ratios <= highest)).all())
    if inside and abs(excess(0.0)) < 1e-12:
        return ratios
    low, high = -float(ratios.max()), highest - float(ratios.min())
    for _ in range(200):  # bisection to the last bit: the excess grows with the shift
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (ratios + high).clamp(0, highest)


def largest_remainder(shares: Tensor, total: int) -> Tensor:
    """Round shares to whole counts of a given sum; the largest remainders go up, first on ties.

    Args:
        shares: float64 `(n,)`, non-negative, of sum within a half of `total`.
        total: Wanted sum.

    Returns:
        int64 `(n,)`, each within one of its share.
    """
    floor = (shares + _EPSILON).floor()
    left = total - int(floor.sum())
    remainder = ((shares - floor) / _EPSILON).round()
    order = torch.argsort(remainder, descending=True, stable=True)
    counts = floor.to(torch.int64)
    counts[order[:left]] += 1
    return counts


def targets(
    allocation: Allocation, layout: Layout, rules: Rules, probe: bool = False
) -> dict[str, Target]:
    """Return how many weights to prune in every linear (and row).

    Args:
        allocation: Wanted ratios.
        layout: The model's linears.
        rules: Budget, comparison and pattern.
        probe: Take the ratios as given, without projection on the budget.

    Returns:
        A target per linear that is pruned; under budget "exact" their counts sum to exactly
        `round(sparsity * prunable weights)`.
    """
    linears = [x for x in layout.linears.values() if x.name not in rules.dense]
    if rules.pattern is not None:
        return _pattern_targets(allocation, layout, linears, rules, probe)
    if rules.budget == "paper":
        return {x.name: _paper_target(allocation, x, rules) for x in linears}
    weights = torch.tensor([x.weights for x in linears], dtype=torch.float64)
    ratios = torch.tensor([allocation.ratios[x.name] for x in linears], dtype=torch.float64)
    if probe:
        total = _round(float((ratios * weights).sum()))
    else:
        total = _round(rules.sparsity * float(weights.sum()))
        ratios = project(ratios, weights, total / float(weights.sum()))
    counts = largest_remainder(ratios * weights, total)
    return {
        x.name: _exact_target(allocation, x, float(r), int(c), rules)
        for x, r, c in zip(linears, ratios, counts, strict=True)
    }


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def _exact_target(
    allocation: Allocation, linear: Linear, ratio: float, count: int, rules: Rules
) -> Target:
    rows = allocation.rows.get(linear.name)
    if rules.comparison == "matrix" or linear.name in allocation.row_importance:
        return _matrix_target(allocation, linear, ratio, count, rules)
    n, d = linear.out_features, linear.in_features
    if rows is None:
        shares = torch.full((n,), count / n, dtype=torch.float64)
    else:
        ones = torch.ones(n, dtype=torch.float64)
        shares = project(rows, ones, count / linear.weights) * d
    return Target(largest_remainder(shares, count), ratio, None, "row", "exact")


def _matrix_target(
    allocation: Allocation, linear: Linear, ratio: float, count: int, rules: Rules
) -> Target:
    return Target(
        torch.tensor([count]),
        ratio,
        comparison="matrix",
        budget=rules.budget,
        row_importance=scaled_importance(allocation.row_importance.get(linear.name)),
        input_importance=scaled_importance(allocation.input_importance.get(linear.name)),
    )


def _paper_target(allocation: Allocation, linear: Linear, rules: Rules) -> Target:
    """The published roundings: int(d r) pruned per row, or int(d (1 - r_i)) kept per row."""
    ratio, d = allocation.ratios[linear.name], linear.in_features
    rows = allocation.rows.get(linear.name)
    if rules.comparison == "matrix" or linear.name in allocation.row_importance:
        return _matrix_target(allocation, linear, ratio, int(linear.weights * ratio), rules)
    if rows is None:
        counts = torch.full((linear.out_features,), int(d * ratio))
        return Target(counts, ratio, None, "row", "paper")
    counts = d - ((1 - rows) * d).floor().to(torch.int64)
    return Target(counts, ratio, None, "row", "paper", prune_last=True)


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
    """Weights pruned of every M in each block; the mean is the sparsity to one step."""
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
    floor = (shares + _EPSILON).floor()
    pruned = [int(p) for p in floor]
    left = rules.sparsity * sum(sizes) * of - sum(p * n for p, n in zip(pruned, sizes, strict=True))
    order = torch.argsort(((shares - floor) / _EPSILON).round(), descending=True, stable=True)
    for b in order.tolist():
        if left > sizes[b] / 2 and pruned[b] < of - 1:
            pruned[b] += 1
            left -= sizes[b]
    # Blocks of unequal size: steps of smaller ones make up for what a larger one left.
    while moves := [
        (abs(left - step * sizes[b]), b, step)
        for b, p in enumerate(pruned)
        for step in (1, -1)
        if 0 <= p + step < of and abs(left - step * sizes[b]) < abs(left) - _EPSILON
    ]:
        _, b, step = min(moves)
        pruned[b] += step
        left -= step * sizes[b]
    return pruned


def to_bytes(allocation: Allocation, found: Layout) -> bytes:
    """Return `allocation.safetensors`: float64 `(out,)` or `(1,)` ratios by linear.

    Importance, where there is any, follows under the linear's name and `:importance`, that of its
    inputs under `:input_importance`.
    """
    tensors = {
        name: allocation.rows[name]
        if name in allocation.rows
        else torch.tensor([allocation.ratios[name]], dtype=torch.float64)
        for name in found.linears
    }
    tensors |= {f"{name}{IMPORTANCE}": x for name, x in allocation.row_importance.items()}
    tensors |= {f"{name}{INPUTS}": x for name, x in allocation.input_importance.items()}
    return to_safetensors(tensors, metadata={"format": "neuroal allocation 1"})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the ratios in a file of an allocation, importance of rows and of inputs, by linear.

    Raises:
        NeuroalError: It cannot be read.
    """
    tensors = load_tensors(path)
    return tensors, _popped(tensors, IMPORTANCE), _popped(tensors, INPUTS)


def _popped(tensors: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    names = [name for name in tensors if name.endswith(suffix)]
    return {name.removesuffix(suffix): tensors.pop(name) for name in names}


def read(path: Path, found: Layout) -> Allocation:
    """Return the allocation of an earlier run's file or output folder.

    Raises:
        NeuroalError: It is none, or of another model.
    """
    tensors, *importance = load(path / FILE if path.is_dir() else path)
    ratios = {name: float(t) if t.numel() == 1 else t for name, t in tensors.items()}
    try:
        return Allocation.of(ratios, found, *importance)
    except NeuroalError as error:
        raise NeuroalError(f"allocation '{path}' does not fit the model: {error}") from error
