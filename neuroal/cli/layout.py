"""`neuroal layout`: what would be pruned in a model."""

from __future__ import annotations

import click

from neuroal.cli.command import Command, message_options, option, print_json, trust_option
from neuroal.cli.layout_tables import layout_json, layout_tables


@click.command(
    cls=Command,
    examples=[
        "neuroal layout demo",
        "neuroal layout path/to/llama --all",
        "neuroal layout path/to/llama --json",
    ],
)
@click.argument("model")
@trust_option
@option("--all", "every", group="Table", is_flag=True, help="Show equal blocks one by one.")
@message_options(json="every block and linear")
def layout(model: str, trust_remote_code: bool, every: bool, as_json: bool) -> None:
    """Show the blocks and linears of MODEL, without loading its weights.

    MODEL is a folder, a hub name, or demo, the built-in model. Linears of one group read the same
    input; a linear's consumer is the one whose input its rows are scored by.
    """
    from neuroal.layout import find
    from neuroal.model import pretrained

    model_layout = find(pretrained.skeleton(model, trust_remote_code))
    if as_json:
        print_json({"model": model} | layout_json(model_layout))
        return
    click.echo("\n\n".join(layout_tables(model_layout, every)))
    click.echo(
        f"\n{model}: {len(model_layout.blocks)} blocks, {len(model_layout.linears)} linears, "
        f"{model_layout.weights:,} prunable weights"
    )
