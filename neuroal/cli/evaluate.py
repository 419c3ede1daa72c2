"""`neuroal evaluate`: the perplexity of a model on a text, its accuracy on tasks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from neuroal.cli.command import (
    SOURCES,
    Command,
    clean_stdout,
    json_option,
    load_options,
    option,
    print_json,
    progress_option,
    quiet_option,
    shows_progress,
    text_options,
    trust_option,
    verbose_option,
)
from neuroal.cli.tables import table
from neuroal.errors import UsageError

if TYPE_CHECKING:
    from neuroal.evaluation.perplexity import Perplexity
    from neuroal.evaluation.zero_shot import ZeroShot


@click.command(
    cls=Command,
    examples=[
        "neuroal evaluate demo",
        "neuroal evaluate llama-wanda-neuroal-0.7 --data test.txt --length 256",
        "neuroal evaluate path/to/llama --data wikitext2 --json",
        "neuroal evaluate path/to/llama --tasks paper --batch-size 16",
        "neuroal evaluate path/to/llama --tasks piqa,mine --include-path my-tasks --limit 100",
    ],
)
@click.argument("model")
@text_options("The test text")
@option(
    "--tasks",
    metavar="paper|TASK,...",
    group="Zero-shot",
    help="Tasks of lm-eval (the extra neuroal[eval]); paper is rte, winogrande, boolq, hellaswag, "
    "arc_easy, arc_challenge and openbookqa.",
)
@option(
    "--include-path",
    metavar="DIR",
    group="Zero-shot",
    help="Folder with task definitions of your own, which may name Python code of theirs to run.",
)
@option(
    "--limit",
    type=int,
    group="Zero-shot",
    help="Ask only so many documents of each task, to try things out.",
)
@load_options
@option(
    "--batch-size",
    "batch",
    type=int,
    group="Model",
    help="Windows or requests per forward pass.  [default: windows of 2048 tokens in all, "
    "8 requests]",
)
@trust_option
@json_option("the result")
@quiet_option
@progress_option
@verbose_option
def evaluate(
    model: str,
    data: str | None,
    length: int | None,
    windows: int | None,
    tasks: str | None,
    include_path: str | None,
    limit: int | None,
    device: str,
    dtype: str,
    batch: int | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    progress: bool | None,
) -> None:
    """Measure the perplexity of MODEL on a text, its accuracy on zero-shot tasks, or both.

    MODEL is a folder, a hub name, or demo, whose --data is its held-out text by default. The text
    is tokenised once and cut into consecutive windows; a .txt file is taken as it is. Tasks run
    through lm-eval, on the model in memory, with the numbers of its own command line. Every result
    comes with its protocol and the hash of what was read.
    """
    source = data or ("demo" if model == "demo" and tasks is None else None)
    if source is None and tasks is None:
        raise UsageError(f"model '{model}' needs --data or --tasks: {SOURCES}, or paper")
    for name, value, needed, given in (
        ("--length", length, "--data", source),
        ("--windows", windows, "--data", source),
        ("--include-path", include_path, "--tasks", tasks),
        ("--limit", limit, "--tasks", tasks),
    ):
        if value is not None and given is None:
            raise UsageError(f"{name} is for {needed}, which is not given")
    from neuroal.data.source import parse_source

    parsed = None if source is None else parse_source(source)
    from neuroal.evaluation import perplexity, text_overlap, zero_shot
    from neuroal.evaluation import tasks as harness
    from neuroal.model import memory, pretrained

    zero_shot.check_sizes(batch, limit)
    shown = shows_progress(progress, quiet)
    start = time.perf_counter()
    with clean_stdout(as_json):
        place = memory.device_of(device)
        config = pretrained.load_config(model, trust_remote_code)
        tokenizer = pretrained.load_tokenizer(model, trust_remote_code)
        asked = cut = None
        if tasks is not None:
            zero_shot.check_tokenizer(tokenizer)
            asked = harness.load_tasks(tasks, include_path, progress=shown)
        if parsed is not None:
            cut = perplexity.windows_for(
                config, parsed, tokenizer, length=length, windows=windows, progress=shown
            )
            calibrated = text_overlap.calibration_of(model, tokenizer)
            if calibrated is not None:
                text_overlap.warn_of_overlap(calibrated, cut)
        loaded, _ = pretrained.load(model, place, dtype, trust_remote_code)
        read = answered = None
        if cut is not None:
            read = perplexity.perplexity(loaded, cut, batch=batch, progress=shown)
        if asked is not None:
            answered = zero_shot.zero_shot(
                loaded, tokenizer, asked, batch=batch, limit=limit, progress=shown
            )
    seconds = time.perf_counter() - start
    if as_json:
        print_json(_json(model, read, answered) | {"seconds": round(seconds, 3)})
    elif quiet:
        click.echo("\n".join(_numbers(read, answered)))
    else:
        click.echo(_text(model, read, answered, seconds))


def _json(model: str, read: Perplexity | None, answered: ZeroShot | None) -> dict[str, Any]:
    values: dict[str, Any] = {"model": model}
    if read is not None:
        values |= read.to_json()
    if answered is not None:
        values |= {"zero_shot": answered.to_json()}
    return values


def _numbers(read: Perplexity | None, answered: ZeroShot | None) -> list[str]:
    """Return the perplexity, then a line of name, metric and value for each of a task's."""
    lines = [] if read is None else [f"{read.perplexity:.4f}"]
    for score in answered.tasks if answered else ():
        values = (x for x in score.metrics.items() if not x[0].endswith("_stderr"))
        lines += [f"{score.name} {metric} {value:.4f}" for metric, value in values]
    return lines


def _text(model: str, read: Perplexity | None, answered: ZeroShot | None, seconds: float) -> str:
    parts = []
    dtype = read.dtype if read is not None else answered.dtype if answered is not None else ""
    rows = [("model", f"{model} ({dtype})")]
    if read is not None:
        rows += [
            ("perplexity", f"{read.perplexity:.4f}"),
            ("windows", f"{read.windows} of {read.length} tokens"),
            ("data", read.data),
            ("sha256 of the tokens", read.sha256),
        ]
    if answered is not None:
        limit = "" if answered.limit is None else f", limited to {answered.limit} a task"
        rows.append(("harness", f"{answered.harness}, {answered.batch} requests a batch{limit}"))
        if answered.accuracy is not None:
            count = sum(x.metric.startswith("acc") for x in answered.tasks)
            over = f" over {count} tasks" if count > 1 else ""
            rows.append(("accuracy", f"{answered.accuracy:.4f}{over}"))
    rows.append(("seconds", f"{seconds:.1f}"))
    parts.append(table(rows))
    if answered is not None:
        headers = ("task", "metric", "value", "stderr", "documents", "few-shot", "version")
        parts.append(table(_task_rows(answered), headers, right=(2, 3, 4, 5)))
    return "\n\n".join(parts)


def _task_rows(answered: ZeroShot) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for score in answered.tasks:
        about = (score.examples, score.few_shot, score.version)
        rows += [(score.name, *x, *about) for x in _values(score.metrics)]
    for name, metrics in answered.groups.items():
        rows += [(f"{name} (group)", *x, None, None, None) for x in _values(metrics)]
    return rows


def _values(metrics: Any) -> list[tuple[str, str, str | None]]:
    """Return name, value and standard error of every metric."""
    return [
        (
            name,
            f"{value:.4f}",
            f"{metrics[f'{name}_stderr']:.4f}" if f"{name}_stderr" in metrics else None,
        )
        for name, value in metrics.items()
        if not name.endswith("_stderr")
    ]
