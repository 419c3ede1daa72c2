"""`neuroal export`: a finished run in another form."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from neuroal.cli.command import (
    Command,
    clean_stdout,
    echo,
    message_options,
    option,
    print_json,
    trust_option,
)
from neuroal.cli.recipe import parse_options
from neuroal.cli.tables import table
from neuroal.types import Tick

_export = partial(option, group="Export")
_run_option = partial(option, group="Run")


@click.command(
    cls=Command,
    examples=[
        "neuroal export pruned --to torch-24 --out pruned-24",
        "neuroal export pruned --to eora -o eora.rank=128 --out companion",
        "neuroal export pruned --to ./mine.py:Mine --out mine",
    ],
)
@click.argument("run")
@_export(
    "--to",
    required=True,
    metavar="NAME",
    help="Exporter: a name from `neuroal plugins list`, distribution:name, or ./mine.py:Mine.",
)
@_export(
    "-o",
    "plugin_options",
    multiple=True,
    metavar="EXPORTER.KEY=VALUE",
    help="Option of the exporter: see `neuroal plugins show EXPORTER`.",
)
@_run_option("--out", required=True, metavar="DIR", help="Folder to write.")
@_run_option("--overwrite", is_flag=True, help="Replace an earlier export or run in the folder.")
@_run_option(
    "--stream/--no-stream",
    default=None,
    help="Read blocks from the disk one at a time; the result is the same.  [default: where the "
    "weights would not fit into memory]",
)
@option("--device", default="auto", group="Model", help="auto, cpu, cuda, cuda:0 or mps.")
@trust_option
@message_options(json="what export.json holds", quiet=True, progress=True)
def export(
    run: str,
    to: str,
    plugin_options: tuple[str, ...],
    out: str,
    overwrite: bool,
    stream: bool | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Write RUN in another form: that of a runtime, or an adapter beside it.

    RUN is the output folder of `neuroal prune`. The folder that is written holds export.json, which
    says what was made of what, by which exporter.
    """
    from neuroal.export import export as write
    from neuroal.progress import bar

    def tick(total: int) -> Tick:
        update: Tick = bar(total=total, desc="export", disable=not progress, leave=False).update
        return update

    with clean_stdout(as_json):
        said = write(
            run,
            to,
            out,
            options=parse_options(plugin_options),
            device=device,
            stream=stream,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            tick=tick,
        )
    if as_json:
        print_json(said)
    elif not quiet:
        echo(_text(said, out))


def _text(said: dict[str, Any], out: str) -> str:
    from neuroal.units import number, size

    def shown(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return f"{value:,}" if isinstance(value, int) else number(value, 4)

    exporter, files = said["exporter"], said["files"]
    rows = [
        ("run", said["run"]["name"]),
        ("exporter", f"{exporter['name']} ({exporter['distribution']} {exporter['version']})"),
        *((key.replace("_", " "), shown(value)) for key, value in said["result"].items()),
        ("files", f"{len(files)}, {size(sum(x['bytes'] for x in files.values()))}"),
        ("written to", out),
    ]
    return table(rows)
