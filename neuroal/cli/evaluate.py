"""`neuroal evaluate`: the perplexity of a model on a text."""

from __future__ import annotations

import time

import click

from neuroal.cli.command import (
    Command,
    clean_stdout,
    json_option,
    option,
    print_json,
    progress_option,
    quiet_option,
    shows_progress,
    trust_option,
)
from neuroal.cli.command import verbose_option as verbose
from neuroal.cli.tables import table
from neuroal.errors import UsageError
from neuroal.recipe import DTYPES

SOURCES = (
    "a .txt, .jsonl, .json or .parquet file (also .gz), c4, wikitext2, ptb, demo, "
    "or a hub data set owner/name[:config][:split][:column]"
)


@click.command(
    cls=Command,
    examples=[
        "neuroal evaluate demo",
        "neuroal evaluate llama-wanda-neuroal-0.7 --data test.txt --length 256",
        "neuroal evaluate path/to/llama --data wikitext2 --json",
    ],
)
@click.argument("model")
@option("--data", metavar="SOURCE", group="Data", help=f"The test text: {SOURCES}.")
@option(
    "--length",
    type=int,
    group="Data",
    help="Tokens per window.  [default: the smaller of 2048 and the model's context]",
)
@option("--windows", type=int, group="Data", help="At most so many windows.  [default: all]")
@option("--device", default="auto", group="Model", help="auto, cpu, cuda, cuda:0 or mps.")
@option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    group="Model",
    help="Dtype to load the weights in; auto is the checkpoint's own.",
)
@trust_option
@json_option("the result")
@quiet_option
@progress_option
@verbose
def evaluate(
    model: str,
    data: str | None,
    length: int | None,
    windows: int | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    progress: bool | None,
) -> None:
    """Measure the perplexity of MODEL on a text.

    MODEL is a folder, a hub name, or demo, whose --data is its held-out text by default. The text
    is tokenised once and cut into consecutive windows; a .txt file is taken as it is.
    """
    source = data or ("demo" if model == "demo" else None)
    if source is None:
        raise UsageError(f"model '{model}' needs --data: {SOURCES}")
    from neuroal.source import parse_source

    parsed = parse_source(source)
    from neuroal import checkpoint
    from neuroal.evaluation.perplexity import evaluation_windows, perplexity

    shown = shows_progress(progress, quiet)
    start = time.perf_counter()
    with clean_stdout(as_json):
        place = checkpoint.device_of(device)
        config = checkpoint.load_config(model, trust_remote_code)
        cut = evaluation_windows(
            parsed,
            checkpoint.load_tokenizer(model, trust_remote_code),
            length=length,
            windows=windows,
            context=checkpoint.context_length(config),
            vocabulary=getattr(config, "vocab_size", None),
            progress=shown,
        )
        loaded, _ = checkpoint.load(model, place, dtype, trust_remote_code)
        result = perplexity(loaded, cut, progress=shown)
    seconds = time.perf_counter() - start
    if as_json:
        print_json({"model": model} | result.to_json() | {"seconds": round(seconds, 3)})
    elif quiet:
        click.echo(f"{result.perplexity:.4f}")
    else:
        rows = [
            ("model", f"{model} ({result.dtype})"),
            ("perplexity", f"{result.perplexity:.4f}"),
            ("windows", f"{result.windows} of {result.length} tokens"),
            ("data", result.data),
            ("sha256 of the tokens", result.sha256),
            ("seconds", f"{seconds:.1f}"),
        ]
        click.echo(table(rows))
