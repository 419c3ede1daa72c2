"""`neuroal layout`: what would be pruned in a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from neuroal.cli.command import (
    Command,
    echo,
    keep_options,
    message_options,
    option,
    print_json,
    trust_option,
)
from neuroal.cli.layout_tables import layout_json, layout_tables

if TYPE_CHECKING:
    from neuroal.layout import Layout


@click.command(
    cls=Command,
    examples=[
        "neuroal layout demo",
        "neuroal layout path/to/llama --all",
        "neuroal layout path/to/llama --json",
        "neuroal layout path/to/llama --keep first:1 --keep '*.o_proj'",
    ],
)
@click.argument("model")
@keep_options
@trust_option
@option("--all", "every", group="Table", is_flag=True, help="Show equal blocks one by one.")
@message_options(json="every block and linear")
def layout(
    model: str,
    keep: tuple[str, ...],
    only: tuple[str, ...],
    trust_remote_code: bool,
    every: bool,
    as_json: bool,
) -> None:
    """Show the blocks and linears of MODEL, without loading its weights.

    MODEL is a folder, a hub name, or demo, the built-in model. Linears of one group read the same
    input; a linear's consumer is the one whose input its rows are scored by.
    """
    from neuroal.model.places import locate

    locate(model)
    from neuroal.layout import kept_linears
    from neuroal.model import structure

    model_layout = structure.layout(model, trust_remote_code)
    kept = kept_linears(model_layout, keep, only)
    if as_json:
        print_json({"model": model} | layout_json(model_layout, kept))
        return
    echo("\n\n".join(layout_tables(model_layout, every, kept)))
    echo(
        f"\n{model}: {len(model_layout.blocks)} blocks, {len(model_layout.linears)} linears, "
        f"{model_layout.weights:,} prunable weights"
    )
    if kept:
        echo(_kept_text(model_layout, kept))


def _kept_text(model_layout: Layout, kept: frozenset[str]) -> str:
    """Return what is pruned and what is kept, and what a sparsity of the one is of all."""
    weights = sum(x.weights for x in model_layout.linears.values() if x.name not in kept)
    share = weights / model_layout.weights
    return (
        f"{len(kept)} linears are kept dense; the others have {weights:,} weights: a sparsity of "
        f"0.5 over these is {share / 2:.4g} over all"
    )
