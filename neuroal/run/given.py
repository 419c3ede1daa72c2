"""Ratios that are given and not searched: of an earlier run, over depth, or by pattern.

Of a linear the last that says something counts: the number or the list of `sparsity`, the
allocation, the entries of `ratios` from the first to the last, `keep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuroal.errors import UsageError
from neuroal.layout import Layout, Linear, selected
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.budget import project
from neuroal.pruning.targets import Rules
from neuroal.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Given:
    """Ratios that are given.

    Attributes:
        allocation: Of every linear, and of rows or their importance if a file has them.
        sparsity: Their mean, over what the rules say.
        notes: By how much they were shifted, if they were.
    """

    allocation: Allocation
    sparsity: float
    notes: tuple[str, ...] = ()


def given_ratios(
    recipe: Recipe, layout: Layout, rules: Rules, earlier: Allocation | None
) -> Given | None:
    """Return the ratios that a recipe gives; None where they are searched for.

    Args:
        recipe: What is asked.
        layout: The model's.
        rules: Which linears stay dense, and what the sparsity is over.
        earlier: What the recipe's allocation says, of some linears or of all.

    Raises:
        UsageError: Something is said twice or not at all, or the wanted sparsity cannot be.
    """
    if not recipe.gives_ratios:
        return None
    notes: list[str] = []
    depth = over_depth(recipe.sparsity, len(layout.blocks))
    ratios = {name: depth[x.block] for name, x in layout.linears.items()}
    if earlier is not None:
        if _says_all(earlier, recipe, rules.pruned(layout)):
            earlier, notes = _shifted(earlier, recipe, layout, rules)
        ratios |= earlier.ratios
    for entry in recipe.ratios:
        depth = over_depth(entry.sparsity, len(layout.blocks))
        for name in selected(layout, [entry.match], "[[ratios]] match"):
            ratios[name] = depth[layout.linears[name].block]
    ratios |= dict.fromkeys(rules.dense, 0.0)
    pruned = sum(ratios[x.name] * x.weights for x in rules.pruned(layout))
    return Given(_with_rows(earlier, ratios, layout), pruned / rules.counted(layout), tuple(notes))


def over_depth(sparsity: float | tuple[float, ...] | None, blocks: int) -> list[float]:
    """Return a ratio per block: straight lines through values that stand at equal distances.

    The first value is that of the first block, the last one that of the last. None is 0.5.
    """
    values = sparsity if isinstance(sparsity, tuple) else (0.5 if sparsity is None else sparsity,)
    ratios = []
    for block in range(blocks):
        place = (block / (blocks - 1) if blocks > 1 else 0.5) * (len(values) - 1)
        left = int(place)
        share = place - left
        right = min(left + 1, len(values) - 1)
        ratios.append(values[left] * (1 - share) + values[right] * share)
    return ratios


def _says_all(earlier: Allocation, recipe: Recipe, pruned: Sequence[Linear]) -> bool:
    """Return whether an allocation has a ratio of every linear; where not, the recipe has others.

    Raises:
        UsageError: Neither or both say what every linear has.
    """
    missing = [x.name for x in pruned if x.name not in earlier.ratios]
    if missing and recipe.sparsity is None:
        raise UsageError(
            f"allocation '{recipe.allocation}' has a ratio of {len(pruned) - len(missing)} of "
            f"{len(pruned)} linears, none of '{missing[0]}': give --sparsity for the others"
        )
    if not missing and isinstance(recipe.sparsity, tuple):
        raise UsageError(
            f"allocation '{recipe.allocation}' and the list of sparsities both give every ratio: "
            "drop one"
        )
    return not missing


def _shifted(
    earlier: Allocation, recipe: Recipe, layout: Layout, rules: Rules
) -> tuple[Allocation, list[str]]:
    """Return an allocation of the wanted sparsity, if there is one, and a note on the shift.

    Every ratio is shifted by one number and clipped; a ratio of 0 stays 0.

    Raises:
        UsageError: Too many ratios are 0.
    """
    if recipe.sparsity is None or isinstance(recipe.sparsity, tuple):
        return earlier, []
    pruned = rules.pruned(layout)
    own = sum(earlier.ratios[x.name] * x.weights for x in pruned)
    wanted = recipe.sparsity * rules.counted(layout)
    if abs(wanted - own) < 0.5:  # weights
        return earlier, []
    moved = [x for x in pruned if earlier.ratios[x.name] > 0]
    weights = torch.tensor([x.weights for x in moved], dtype=torch.float64)
    before = torch.tensor([earlier.ratios[x.name] for x in moved], dtype=torch.float64)
    if wanted > float(weights.sum()):
        raise UsageError(
            f"sparsity {recipe.sparsity:g} is more than allocation '{recipe.allocation}' can have: "
            f"{len(pruned) - len(moved)} of {len(pruned)} linears have the ratio 0, which stays"
        )
    after = project(before, weights, wanted / float(weights.sum()))
    shift = after - before
    most = float(shift[shift.abs().argmax()])
    mean = own / rules.counted(layout)
    note = (
        f"allocation '{recipe.allocation}' has a sparsity of {mean:.6g}: its ratios are shifted by "
        f"{most:+.4g} to have {recipe.sparsity:g}; a ratio of 0 stays 0"
    )
    ratios = dict(zip((x.name for x in moved), after.tolist(), strict=True))
    return replace(earlier, ratios={**earlier.ratios, **ratios}), [note]


def _with_rows(
    earlier: Allocation | None, ratios: Mapping[str, float], layout: Layout
) -> Allocation:
    """Return the ratios of linears with what an allocation says of their rows.

    Ratios of rows are shifted to the mean of their linear; those of 0 stay 0. Importance of rows
    has no use in a linear of ratio 0.
    """
    if earlier is None:
        return Allocation(ratios)
    rows = {
        name: _rows(earlier.rows.get(name), ratios[name], x) for name, x in layout.linears.items()
    }
    importance = {name: x for name, x in earlier.importance.items() if ratios[name] > 0}
    return Allocation(ratios, rows if earlier.rows else {}, importance)


def _rows(rows: Tensor | None, ratio: float, linear: Linear) -> Tensor:
    """Return ratios of rows `(out,)` of mean `ratio`: those given, shifted, else all alike."""
    alike = torch.full((linear.out_features,), ratio, dtype=torch.float64)
    pruned = None if rows is None else rows > 0
    if rows is None or pruned is None or ratio == 0 or float(pruned.double().mean()) < ratio:
        return alike
    shifted = rows.clone()
    mean = ratio * len(rows) / int(pruned.sum())
    shifted[pruned] = project(rows[pruned], torch.ones_like(rows[pruned]), mean)
    return shifted
