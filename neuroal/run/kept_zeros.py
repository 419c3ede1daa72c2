"""Zeros that the dense model has already: counted, and kept where a linear has many of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from neuroal.errors import UsageError
from neuroal.layout import Layout
from neuroal.model.blocks import Blocks
from neuroal.model.zeros import MANY, rows_of_zeros
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.targets import Rules
from neuroal.recipe import Recipe


def with_kept_zeros(
    recipe: Recipe, rules: Rules, layout: Layout, blocks: Blocks, given: Allocation | None = None
) -> tuple[Rules, list[str]]:
    """Return rules that keep the zeros of the dense model, and a note if there are any to keep.

    They are kept in the linears that are pruned and of whose weights they are at least a tenth. A
    ratio of `given` that is below them is theirs. Where they need not be kept, there is a note if
    they are more than the sparsity that is wanted.

    Raises:
        UsageError: They are more than the exact budget prunes.
    """
    zeros = {}
    for block in layout.blocks:
        with blocks.open(block) as module:
            rows = rows_of_zeros(block, module)
        for x in block.linears:
            if x.name not in rules.dense and int(rows[x.name].sum()) >= MANY * x.weights:
                zeros[x.name] = rows[x.name]
    if not zeros:
        return rules, []
    prunable = rules.pruned(layout)
    weights = sum(x.weights for x in prunable)
    kept = sum(int(rows.sum()) for rows in zeros.values())
    of = "all weights" if not rules.dense else "the weights of linears that are pruned"
    exceeds = kept > int(rules.sparsity * rules.counted(layout) + 0.5)
    if not recipe.keep_zeros:
        note = f"{kept / weights:.4f} of {of} are zero already, more than the wanted sparsity "
        note += f"{rules.sparsity:g}: where the pruner moves no weight, they stay zero"
        return rules, [note] if exceeds else []
    note = (
        f"{len(zeros)} of {len(prunable)} linears are sparse already: their zeros stay, "
        f"{kept / weights:.4f} of {of} (--no-keep-zeros)"
    )
    if given is not None and rules.pattern is None:
        note += _raised(given, {n: int(rows.sum()) for n, rows in zeros.items()}, rules, layout)
    elif exceeds:
        if rules.budget == "exact" and rules.pattern is None:
            raise UsageError(
                f"the model is sparser than it is to be: {kept / weights:.4f} of its weights are "
                f"zero already, and sparsity {rules.sparsity:g} is wanted: give a higher "
                "--sparsity, or --no-keep-zeros"
            )
        note += f"; that is more than the wanted sparsity {rules.sparsity:g}"
    return replace(rules, zeros=zeros), [note]


def _raised(given: Allocation, zeros: Mapping[str, int], rules: Rules, layout: Layout) -> str:
    """Return what to say of given ratios that are below the zeros that stay."""
    wanted = {x.name: given.ratios[x.name] * x.weights for x in rules.pruned(layout)}
    low = [name for name, count in zeros.items() if wanted[name] < count - 0.5]
    if not low:
        return ""
    total = sum(max(count, zeros.get(name, 0)) for name, count in wanted.items())
    many = f"{len(low)} of the ratios that are given" if len(low) > 1 else "one given ratio"
    return (
        f"; {many} would be less, and rise to them: a sparsity of "
        f"{total / rules.counted(layout):.4f} in place of {rules.sparsity:.4g}"
    )
