"""`neuroal study`: many cases from one file."""

from __future__ import annotations

import importlib.resources
import shlex
import time
from functools import partial
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import click

from neuroal.cli.command import (
    Group,
    Stopped,
    allow_option,
    clean_stdout,
    echo,
    message_options,
    option,
    print_json,
    say,
    trust_option,
)
from neuroal.cli.study_text import (
    csv_text,
    outcome_json,
    outcome_text,
    plan_json,
    plan_text,
    tables_text,
    unfinished,
)
from neuroal.errors import NeuroalError, UsageError, nearest
from neuroal.escape import terminal

if TYPE_CHECKING:
    from neuroal.study.run import Execution, PreparedStudy

_OUT_HELP = "Results folder.  [default: the file's name and -results]"
_run_option = partial(option, group="Run")


@click.group(
    cls=Group,
    examples=[
        "neuroal study init study.toml",
        "neuroal study plan study.toml",
        "neuroal study run study.toml --jobs 2",
        "neuroal study table study-results",
    ],
)
def study() -> None:
    """Compare methods: models × pruners × top-ups × sparsities, from one file."""


@study.command(examples=["neuroal study init", "neuroal study init paper.toml --paper"])
@click.argument("file", default="study.toml")
@option("--paper", is_flag=True, group="Study", help="Write the grid of NeuroAL's paper.")
@message_options()
def init(file: str, paper: bool) -> None:
    """Write a study FILE to begin with: a small one of the built-in model, ready to run."""
    path = Path(file)
    if path.exists():
        raise UsageError(f"'{file}' exists: give another name")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder '{path.parent}' to write '{path.name}' in")
    template = "paper.toml.in" if paper else "study.toml.in"
    text = (importlib.resources.files("neuroal.study") / "templates" / template).read_text("utf-8")
    name = shlex.quote(file)
    path.write_text(Template(text).substitute(name=name), encoding="utf-8")
    echo(f"{file}: see what it would do with `neuroal study plan {name}`")


@study.command(
    examples=[
        "neuroal study plan study.toml",
        "neuroal study plan study.toml --jobs 4 --no-time",
        "neuroal study plan study.toml --json",
    ]
)
@click.argument("file")
@_run_option("--out", metavar="DIR", help=_OUT_HELP)
@_run_option("--jobs", type=click.IntRange(1), default=1, help="Cases at once.")
@_run_option(
    "--time/--no-time",
    "timed",
    default=True,
    show_default=False,
    help="Say how long it will take, from finished cases or by loading models to time them.",
)
@allow_option
@trust_option
@message_options(json="the plan with every case", quiet=True, progress=True)
def plan(
    file: str,
    out: str | None,
    jobs: int,
    timed: bool,
    allow_plugin_files: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Say how many cases the study in FILE has, what is left of them, and how long that takes.

    Texts that are at hand are cut into windows for it, but for large ones: what is too short is
    met here.
    """
    _refuse_mistakes(file)
    from neuroal.study.file import within
    from neuroal.study.run import prepare
    from neuroal.study.texts import look

    with clean_stdout(as_json):
        prepared = prepare(Path(file), _folder(file, out), trust_remote_code, allow_plugin_files)
        with within(f"study '{file}'"):
            notes = look(prepared, trust_remote_code)
        guess = None
        if timed and prepared.jobs:
            from neuroal.study.estimate import estimate

            guess = estimate(
                prepared.jobs,
                prepared.study.evaluations,
                prepared.known,
                trust_remote_code,
                progress,
            )
    if as_json:
        print_json(plan_json(prepared, guess, notes))
    else:
        echo(plan_text(prepared, guess, jobs, notes))


@study.command(
    examples=[
        "neuroal study run study.toml",
        "neuroal study run study.toml --jobs 4 --out results",
        "neuroal study run study.toml --executor ray --gpus-per-case 0.5",
    ]
)
@click.argument("file")
@_run_option("--out", metavar="DIR", help=_OUT_HELP)
@_run_option(
    "--jobs", type=click.IntRange(1), help="Cases at once.  [default: 1; on Ray, as many as fit]"
)
@_run_option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="Where: processes of this machine, or a Ray cluster (the one of RAY_ADDRESS, or here).",
)
@_run_option(
    "--gpus-per-case",
    type=click.FloatRange(0),
    default=0.0,
    metavar="F",
    help="GPUs of a case on Ray; below 1, cases share one.",
)
@allow_option
@trust_option
@message_options(json="what became of the study", quiet=True, progress=True)
def run(
    file: str,
    out: str | None,
    jobs: int | None,
    executor: str,
    gpus_per_case: float,
    allow_plugin_files: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    progress: bool,
) -> None:
    """Run what is left of the study in FILE; stop it and start it again at will.

    Every finished case is one file in the results folder, and is never run again. A case that
    fails is recorded with its error, does not stop the others, and is tried again by the next run.
    """
    _refuse_mistakes(file)
    from neuroal.model.output import one_writer
    from neuroal.study.run import Execution, prepare

    start = time.perf_counter()
    folder = _folder(file, out)
    with one_writer(folder, in_place=True):  # not in a while, when the cases are known
        pass
    with clean_stdout(as_json):
        execution = Execution(executor, jobs, gpus_per_case, trust_remote_code, progress=progress)
        prepared = prepare(Path(file), folder, trust_remote_code, allow_plugin_files)
        failed = _run(prepared, execution, progress)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(outcome_json(prepared, failed, seconds))
    elif not quiet:
        echo(outcome_text(prepared, failed, seconds))
    if failed:
        first = failed[0]
        raise NeuroalError(
            f"{len(failed)} of {len(prepared.expansion.distinct)} cases failed, the first: "
            f"{first['title']}: {first['error']} (see '{first['file']}')"
        )


def _refuse_mistakes(file: str) -> None:
    """Refuse what is known to be wrong before the seconds that torch takes to be imported."""
    from neuroal.study.mistakes import read_checked

    read_checked(Path(file))


def _folder(file: str, out: str | None) -> Path:
    from neuroal.model.output import output_folder

    return output_folder(out or f"{Path(file).stem}-results", in_place=True)


def _run(prepared: PreparedStudy, execution: Execution, progress: bool) -> list[dict[str, str]]:
    """Run what is left and return what failed."""
    from neuroal.progress import bar as open_bar
    from neuroal.study.cases import title
    from neuroal.study.results import FAILED, case_file
    from neuroal.study.run import run

    failed = []
    total = len(prepared.expansion.distinct)
    bar = open_bar(
        total=total, initial=prepared.finished, desc="study", unit="case", disable=not progress
    )
    with bar:
        try:
            for result in run(prepared, execution):
                bar.set_postfix_str(terminal(title(result["case"])))
                bar.update()
                if result["status"] == FAILED:
                    file = case_file(prepared.out, result["id"])
                    name = title(result["case"])
                    failed.append({"title": name, "error": result["error"], "file": str(file)})
        except KeyboardInterrupt:
            raise Stopped("interrupted; the same command goes on from here") from None
    return failed


@study.command(
    "table",
    examples=[
        "neuroal study table study-results",
        "neuroal study table study-results --metric wikitext2 --format latex",
        "neuroal study table study-results --format csv",
    ],
)
@click.argument("folder")
@option(
    "--format",
    "style",
    type=click.Choice(["github", "latex", "csv"]),
    default="github",
    group="Table",
    help="csv has a line per model, method, sparsity and evaluation.",
)
@option("--metric", metavar="NAME", group="Table", help="One evaluation.  [default: all of them]")
@message_options(json="the lines of --format csv")
def table_command(folder: str, style: str, metric: str | None, as_json: bool) -> None:
    """Show the results in FOLDER, finished or not: mean ± deviation over seeds, the best in bold.

    The best is that of the top-ups on the same model, pruner and sparsity; where a study has one
    top-up, of the pruners on the same model and sparsity.
    """
    from dataclasses import asdict

    from neuroal.study.results import read_study
    from neuroal.study.table import cells

    results = read_study(Path(folder))
    scores = cells(results)
    if not scores:
        raise NeuroalError(f"no case of '{folder}' is finished yet")
    names = list(dict.fromkeys(cell.evaluation for cell in scores))
    if metric is not None and metric not in names:
        raise UsageError(f"'{folder}' has no evaluation '{metric}': {nearest(metric, names)}")
    chosen = [cell for cell in scores if metric in (None, cell.evaluation)]
    if as_json:
        print_json({"name": results.study["name"], "cells": [asdict(cell) for cell in chosen]})
    elif style == "csv":
        echo(csv_text(chosen), nl=False)
    else:
        echo(tables_text(chosen, style))
        for line in unfinished(results):
            say(line)
