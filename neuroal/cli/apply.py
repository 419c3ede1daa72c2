"""`neuroal apply`: an earlier run's masks on a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from neuroal.cli.command import (
    Command,
    clean_stdout,
    echo,
    message_options,
    option,
    print_json,
    say,
    trust_option,
)

_run_option = partial(option, group="Run")


@click.command(
    cls=Command,
    examples=[
        "neuroal apply path/to/llama masks.safetensors --out sparse",
        "neuroal apply path/to/llama earlier-run --weights --out same",
        "neuroal apply path/to/finetuned earlier-run --any-model --out sparse",
    ],
)
@click.argument("model")
@click.argument("run_or_file")
@_run_option("--out", required=True, metavar="DIR", help="Folder to write.")
@_run_option(
    "--weights",
    is_flag=True,
    help="Take the weights that stay from the run too, where its pruner moved them.",
)
@_run_option(
    "--any-model",
    is_flag=True,
    help="Let MODEL be another than the one that was pruned: a fine-tuned one, say.",
)
@_run_option("--overwrite", is_flag=True, help="Replace an earlier run in the folder.")
@_run_option(
    "--stream/--no-stream",
    default=None,
    help="Read blocks from the disk one at a time; the result is the same.  [default: where the "
    "weights would not fit into memory]",
)
@trust_option
@message_options(json="the report", quiet=True, progress=True)
def apply(
    model: str,
    run_or_file: str,
    out: str,
    weights: bool,
    any_model: bool,
    overwrite: bool,
    stream: bool | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Put the masks of an earlier run on MODEL, and write it as `neuroal prune` does.

    RUN_OR_FILE is the folder of a run, or the masks.safetensors that --save-masks wrote. MODEL has
    to be the one that was pruned, by its SHA-256.
    """
    from neuroal.model.places import locate

    locate(model)
    from neuroal.run.apply import apply as put

    with clean_stdout(as_json):
        report = put(
            model,
            run_or_file,
            out,
            weights=weights,
            any_model=any_model,
            stream=stream,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
    if quiet:
        return
    from neuroal.cli.summary import run_text

    if as_json:
        say(f"written to {out}")
    else:
        echo(run_text(report, Path(out)))
