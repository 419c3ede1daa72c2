"""The command `neuroal`: one module per subcommand; the only place that prints.

Nothing here imports torch, transformers or a plugin before a command needs it.
"""

from __future__ import annotations

import sys
from typing import Any

import click

import neuroal
from neuroal.cli.apply import apply
from neuroal.cli.bench import bench
from neuroal.cli.command import Group, say
from neuroal.cli.compare import compare
from neuroal.cli.demo import demo
from neuroal.cli.evaluate import evaluate
from neuroal.cli.export import export
from neuroal.cli.finetune import finetune
from neuroal.cli.layout import layout
from neuroal.cli.pack import pack, unpack
from neuroal.cli.plugins import plugins
from neuroal.cli.prune import prune
from neuroal.cli.report import report
from neuroal.cli.study import study
from neuroal.cli.verify import verify
from neuroal.errors import UsageError


class _NeuroalGroup(Group):
    """Ends in one line on stderr and the right exit code, whatever happens."""

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without λ
        try:
            status = super().main(*args, **(extra | {"standalone_mode": False}))
        except click.UsageError as error:
            say(f"Error: {error.format_message()}{_hint(error)}")
            status = error.exit_code
        except click.ClickException as error:
            say(f"Error: {error.format_message()}")
            status = error.exit_code
        except click.Abort:
            say("Error: interrupted")
            status = 130
        sys.exit(status if isinstance(status, int) else 0)


def _only(ctx: click.Context, _parameter: click.Parameter, names: str | None) -> None:
    if names is None:
        return
    from neuroal.plugins import trust

    try:
        ctx.with_resource(trust.only(names))
    except UsageError as error:
        raise click.BadParameter(str(error)) from None


def _hint(error: click.UsageError) -> str:
    return f" (see '{error.ctx.command_path} --help')" if error.ctx else ""


@click.group(
    cls=_NeuroalGroup,
    examples=[
        "neuroal demo",
        "neuroal prune path/to/llama --sparsity 0.7 --calibration texts.jsonl --out pruned",
        "neuroal evaluate pruned --data test.txt",
        "neuroal plugins list",
    ],
)
@click.option(
    "--only-plugins",
    metavar="DIST,...",
    callback=_only,
    expose_value=False,
    help="Let only these distributions' plugins load, beside neuroal's own; ./ stands for plugins "
    "from files. The variable NEUROAL_ONLY_PLUGINS does the same.",
)
@click.version_option(neuroal.__version__, prog_name="neuroal")
def main() -> None:
    """Prune language models in one shot; every method is a plugin."""


for _command in (
    prune,
    apply,
    finetune,
    export,
    evaluate,
    compare,
    study,
    report,
    plugins,
    layout,
    demo,
    pack,
    unpack,
    verify,
    bench,
):
    main.add_command(_command)
