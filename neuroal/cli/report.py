"""`neuroal report`: runs and studies as one HTML file."""

from __future__ import annotations

from functools import partial

import click

from neuroal.cli.command import Command, echo, message_options, option
from neuroal.units import size

_output = partial(option, group="Output")


@click.command(
    cls=Command,
    examples=[
        "neuroal report pruned",
        "neuroal report uniform neuroal --out both.html --title 'With and without NeuroAL'",
        "neuroal report my-study --out study.html --overwrite",
    ],
)
@click.argument("subjects", nargs=-1, metavar="RUN_OR_STUDY...")
@_output("--out", default="report.html", metavar="FILE", help="The file to write.")
@_output("--title", help="Its heading.  [default: that of the only subject]")
@_output("--overwrite", is_flag=True, help="Replace an earlier file.")
@message_options(quiet=True, progress=True)
def report(
    subjects: tuple[str, ...],
    out: str,
    title: str | None,
    overwrite: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Show runs and studies in one HTML file.

    RUN_OR_STUDY is the output folder of a run (or its neuroal.json), or of a study, or the file of
    a study's case. The page needs nothing beside it: no network, no script. It is light or dark as
    the browser is, and prints.

    Needs the extra: pip install 'neuroal[report]'.
    """
    from neuroal.html_report import write

    count = write(subjects, out, title=title, overwrite=overwrite, progress=progress)
    if not quiet:
        echo(f"written to {out} ({size(count)})")
