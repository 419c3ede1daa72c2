"""Zeros that the dense model has already: counted, and kept where a linear has many of them."""

from __future__ import annotations

from dataclasses import replace

from neuroal.errors import UsageError
from neuroal.layout import Layout
from neuroal.model.blocks import Blocks
from neuroal.model.zeros import MANY, rows_of_zeros
from neuroal.pruning.targets import Rules
from neuroal.recipe import Recipe


def with_kept_zeros(
    recipe: Recipe, rules: Rules, layout: Layout, blocks: Blocks
) -> tuple[Rules, list[str]]:
    """Return rules that keep the zeros of the dense model, and a note if there are any to keep.

    They are kept in the linears that are pruned and of whose weights they are at least a tenth.

    Raises:
        UsageError: They are more than the exact budget prunes.
    """
    if not recipe.keep_zeros:
        return rules, []
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
    note = (
        f"{len(zeros)} of {len(prunable)} linears are sparse already: their zeros stay, "
        f"{kept / weights:.4f} of all weights (--no-keep-zeros)"
    )
    if kept > int(rules.sparsity * rules.counted(layout) + 0.5):
        if rules.budget == "exact" and rules.pattern is None:
            raise UsageError(
                f"the model is sparser than it is to be: {kept / weights:.4f} of its weights are "
                f"zero already, and sparsity {rules.sparsity:g} is wanted: give a higher "
                "--sparsity, or --no-keep-zeros"
            )
        note += f"; that is more than the wanted sparsity {rules.sparsity:g}"
    return replace(rules, zeros=zeros), [note]
