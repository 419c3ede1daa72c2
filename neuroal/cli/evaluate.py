"""`neuroal evaluate`: the perplexity of a model on a text, its accuracy on tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import click

from neuroal.cli.command import (
    SOURCES,
    Command,
    check_needed,
    clean_stdout,
    echo,
    load_options,
    message_options,
    option,
    print_json,
    text_options,
    trust_option,
)
from neuroal.cli.tables import table
from neuroal.errors import UsageError
from neuroal.types import Bos
from neuroal.units import begun_with

if TYPE_CHECKING:
    from neuroal.evaluation.perplexity import Perplexity
    from neuroal.evaluation.zero_shot import ZeroShot


_zero_shot = partial(option, group="Zero-shot")


@click.command(
    cls=Command,
    examples=[
        "neuroal evaluate demo",
        "neuroal evaluate pruned --data test.txt --length 256",
        "neuroal evaluate path/to/llama --data wikitext2 --json",
        "neuroal evaluate path/to/llama --tasks paper --batch-size 16",
        "neuroal evaluate path/to/llama --tasks piqa,mine --include-path my-tasks --limit 100",
    ],
)
@click.argument("model")
@text_options("The test text")
@_zero_shot(
    "--tasks",
    metavar="paper|TASK,...",
    help="Tasks of lm-eval (the extra neuroal[eval]); paper is rte, winogrande, boolq, hellaswag, "
    "arc_easy, arc_challenge and openbookqa.",
)
@_zero_shot(
    "--include-path",
    metavar="DIR",
    help="Folder with task definitions of your own, which may name Python code of theirs to run.",
)
@_zero_shot("--limit", type=int, help="Ask only so many documents of each task, to try things out.")
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
@message_options(json="the result", quiet=True, progress=True)
def evaluate(
    model: str,
    data: str | None,
    length: int | None,
    windows: int | None,
    bos: Bos | None,
    pack_documents: bool | None,
    tasks: str | None,
    include_path: str | None,
    limit: int | None,
    device: str,
    dtype: str,
    batch: int | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Measure the perplexity of MODEL on a text, its accuracy on zero-shot tasks, or both.

    MODEL is a folder, a hub name, or demo, whose --data is its held-out text by default. The text
    is tokenised once and cut into consecutive windows; a .txt file is taken as it is. Tasks run
    through lm-eval, on the model in memory, with the numbers of its own command line. Every result
    comes with its protocol and the hash of what was read. Of the output folder of a run, it is kept
    in the run's neuroal.json and model card, and shown beside the dense model's number where the
    run has measured that.
    """
    from neuroal.model.places import locate
    from neuroal.run.mistakes import check_text

    locate(model)
    source = data or ("demo" if model == "demo" and tasks is None else None)
    if source is None and tasks is None:
        raise UsageError(f"{_named(model)} needs --data or --tasks: {SOURCES}, or paper")
    how = {"length": length, "windows": windows, "bos": bos, "pack_documents": pack_documents}
    check_needed("--data", source, **how)
    check_needed("--tasks", tasks, include_path=include_path, limit=limit)
    if source is not None:
        check_text(source, model, windows, length)
    from neuroal.evaluation.evaluate import evaluate as measure

    with clean_stdout(as_json):
        found = measure(
            model,
            data=source,
            length=length,
            windows=windows,
            bos=bos or "auto",
            pack_documents=pack_documents,
            tasks=tasks,
            include_path=include_path,
            limit=limit,
            device=device,
            dtype=dtype,
            batch=batch,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    read, answered = found.perplexity, found.zero_shot
    kept = _kept(model, read, answered)
    if as_json:
        print_json(found.to_json() | kept.to_json())
    elif quiet:
        echo("\n".join(_numbers(read, answered)))
    else:
        kept = replace(kept, notes=[*found.notes, *kept.notes])
        echo("\n\n".join(_texts(model, read, answered, kept, found.seconds)))


def _named(model: str) -> str:
    """Return a model's name, and that it is no folder here."""
    from neuroal.model.places import local_folder, similar_folder

    if local_folder(model) is not None:
        return f"model '{model}'"
    similar = similar_folder(model)
    meant = f" (did you mean '{similar}'?)" if similar else ""
    return f"model '{model}' is no folder here{meant}: as a name on the hub it"


@dataclass(frozen=True)
class _Kept:
    """What became of a result in the folder of a run; nothing where the model is no run's.

    Attributes:
        place: The report that has it; None where the folder cannot be written to.
        beside: The dense model's perplexity, difference and excess, where the run knows them.
        notes: What is to be said of them.
    """

    place: Path | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return {**self.beside, **({"kept_in": str(self.place)} if self.place else {})}


def _kept(model: str, read: Perplexity | None, answered: ZeroShot | None) -> _Kept:
    """Keep a result in the folder of the run that a model is the output of."""
    from neuroal.evaluation import quality
    from neuroal.model.files import MARKER, read_report
    from neuroal.run import later

    folder = later.run_folder_of(model)
    if folder is None:
        return _Kept()
    report, entry = read_report(folder), None
    if read is not None:
        entry = quality.with_dense(quality.entry(read, None), report)
    written = later.keep(folder, entry, None if answered is None else answered.to_json())
    place = folder / MARKER if written else None
    if entry is None:
        return _Kept(place)
    if entry["dense_perplexity"] is None:
        note = quality.in_another_dtype(entry, report)
        return _Kept(place, notes=[note] if note else [])
    notes = list(quality.collapses({**report, "evaluation": [entry]}))
    return _Kept(place, {key: entry[key] for key in quality.BESIDE}, notes)


def _numbers(read: Perplexity | None, answered: ZeroShot | None) -> list[str]:
    """Return the perplexity, then a line of name, metric and value for each of a task's."""
    lines = [] if read is None else [f"{read.perplexity:.4f}"]
    for score in answered.tasks if answered else ():
        lines += [f"{score.name} {metric} {value}" for metric, value, _ in _values(score.metrics)]
    return lines


def _texts(
    model: str,
    read: Perplexity | None,
    answered: ZeroShot | None,
    kept: _Kept,
    seconds: float,
) -> Iterator[str]:
    dtype = read.dtype if read is not None else answered.dtype if answered is not None else ""
    rows = [("model", f"{model} ({dtype})")]
    if read is not None:
        rows.append(("perplexity", f"{read.perplexity:.4f}"))
        if kept.beside:
            dense, difference, excess = (float(x) for x in kept.beside.values())
            rows.append(("dense model", f"{dense:.4f} ({difference:+.4f}, excess {excess:.4f})"))
        rows += [
            *((("reason", fill(read.reason, 60)),) if read.reason else ()),
            ("windows", f"{read.windows} of {read.length} tokens{begun_with(read.bos)}"),
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
    if kept.place is not None:
        rows.append(("kept in", str(kept.place)))
    yield table(rows)
    if answered is not None:
        headers = ("task", "metric", "value", "stderr", "documents", "few-shot", "version")
        yield table(_task_rows(answered), headers, right=(2, 3, 4, 5))
    if kept.notes:
        yield "\n".join(f"Note: {note}" for note in kept.notes)


def _task_rows(answered: ZeroShot) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = [
        (score.name, *x, score.examples, score.few_shot, score.version)
        for score in answered.tasks
        for x in _values(score.metrics)
    ]
    for name, metrics in answered.groups.items():
        rows += [(f"{name} (group)", *x, None, None, None) for x in _values(metrics)]
    return rows


def _values(metrics: Any) -> list[tuple[str, str, str | None]]:
    """Return name, value and standard error of every metric."""
    texts = {name: f"{value:.4f}" for name, value in metrics.items()}
    return [
        (name, text, texts.get(f"{name}_stderr"))
        for name, text in texts.items()
        if not name.endswith("_stderr")
    ]
