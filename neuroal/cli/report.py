"""`neuroal report`: runs and studies as one HTML file."""

from __future__ import annotations

import click

from neuroal.cli.command import (
    Command,
    option,
    progress_option,
    quiet_option,
    shows_progress,
    verbose_option,
)
from neuroal.units import size


@click.command(
    cls=Command,
    examples=[
        "neuroal report llama-wanda-neuroal-0.7",
        "neuroal report uniform neuroal --out both.html --title 'With and without NeuroAL'",
        "neuroal report my-study --out study.html --overwrite",
    ],
)
@click.argument("subjects", nargs=-1, metavar="RUN_OR_STUDY...")
@option("--out", default="report.html", metavar="FILE", group="Output", help="The file to write.")
@option("--title", group="Output", help="Its heading.  [default: that of the only subject]")
@option("--overwrite", is_flag=True, group="Output", help="Replace an earlier file.")
@quiet_option
@progress_option
@verbose_option
def report(
    subjects: tuple[str, ...],
    out: str,
    title: str | None,
    overwrite: bool,
    quiet: bool,
    progress: bool | None,
) -> None:
    """Show runs and studies in one HTML file.

    RUN_OR_STUDY is the output folder of a run (or its neuroal.json), or of a study, or the file of
    a study's case. The page needs nothing beside it: no network, no script. It is light or dark as
    the browser is, and prints.

    Needs the extra: pip install 'neuroal[report]'.
    """
    from neuroal.html_report import write

    count = write(
        subjects, out, title=title, overwrite=overwrite, progress=shows_progress(progress, quiet)
    )
    if not quiet:
        click.echo(f"written to {out} ({size(count)})")
