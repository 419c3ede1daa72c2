"""Every pruner with every top-up on four models, as a study, and what it says in tables.

    python benchmarks/results.py SHARED --results FOLDER [--pruner wanda] [--top-up best] [--jobs 2]
    python benchmarks/results.py SHARED --results FOLDER --only-tables --out docs/results.md

SHARED is the folder that holds `models/` and `data/`. A case that FOLDER holds is not run again, so
that the command can be stopped, narrowed and repeated. Calibration: 32 windows of 256 tokens of
`data/calibration.jsonl`, the first 8 for the search (all for that of best-slow), exact budget.
Perplexity: the first 100 windows of 256 tokens of each text.

Without --out, tables are of the cases in FOLDER. With it, these are merged into the record, which
is the .csv beside --out, and tables of the whole record replace what stands between the markers of
--out; with --only-tables FOLDER need not be there, and SHARED may be any folder.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from neuroal.study.run import Execution, prepare, run

MODELS = ("llama", "mistral", "phi", "opt")
PRUNERS = ("magnitude", "wanda", "sparsegpt", "multiflow", "ria", "admm", "alps")
TOP_UPS = (
    "uniform", "neuroal-block", "neuroal-row", "neuroal", "neuroal-fast", "owl", "dlp",
    "alphapruning", "dsnot", "evolution", "best", "best-slow",
)  # fmt: skip
# Evolution in the block runs of the paper's search, 2·6·8·29 on these models of 6 blocks; by itself
# it takes some 200 times as many. The other options served best, of eight choices, on calibration
# windows.
EVOLUTION = (
    '{name = "evolution", options = {evolution = '
    "{block_runs = 2784, offspring = 8, windows = [2], survivors = [1], step = 0.1}}}"
)
SPARSITIES = (0.6, 0.7, 0.8)
AXES = ("model", "pruner", "sparsity", "top_up")
TEXTS = {"wikitext2": "wikitext2.test.txt", "ptb": "ptb.test.txt", "heldout": "heldout.jsonl"}

Cell = tuple[str, str, float]
Key = tuple[str, str, float, str]
"""(model, pruner, sparsity, top-up); ("llama", "", 0.0, "") is dense."""
Scores = dict[Key, dict[str, float]]
"""Perplexity by text and, where they are known, `block_runs`."""


def study(shared: Path, **axes: Sequence[Any]) -> str:
    """Return the study file of some models, pruners, top-ups and sparsities."""
    models = [str(shared.resolve() / "models" / name) for name in axes.pop("models")]
    lines = [f"models = {json.dumps(models)}"]
    top_ups = [EVOLUTION if x == "evolution" else json.dumps(x) for x in axes.pop("top_ups")]
    lines += [f"{axis} = {json.dumps(list(values))}" for axis, values in axes.items()]
    lines += [f"top_ups = [{', '.join(top_ups)}]"]
    source = json.dumps(str(shared.resolve() / "data/calibration.jsonl"))
    lines += ["[calibration]", f"source = {source}", "samples = 32"]
    lines += ["length = 256"]
    for label, file in TEXTS.items():
        data = json.dumps(str(shared.resolve() / "data" / file))
        lines += ["[[evaluations]]", f'label = "{label}"', f"data = {data}"]
        lines += ["length = 256", "windows = 100"]
    return "\n".join(lines) + "\n"


def read_scores(folder: Path) -> Scores:
    """Return what there is to know of every finished case in a results folder."""
    scores: Scores = {}
    for file in (folder / "cases").glob("*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["status"] != "done":
            continue
        case = result["case"]
        key = (case["model"], case["pruner"] or "", case["sparsity"], case["top_up"] or "")
        scores[key] = {text: float(result["scores"][text]["value"]) for text in TEXTS}
        if result["report"] is not None:
            scores[key]["block_runs"] = result["report"]["counts"]["block_runs"]
    return scores


def read_record(file: Path) -> Scores:
    """Return what a record holds; nothing where there is none."""
    scores: Scores = {}
    if file.exists():
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                key = (row["model"], row["pruner"], float(row["sparsity"]), row["top_up"])
                scores[key] = {text: float(row[text]) for text in TEXTS}
                if row["block_runs"]:
                    scores[key]["block_runs"] = int(row["block_runs"])
    return scores


def write_record(file: Path, scores: Scores) -> None:
    """Write a record in one step: a line per case, in the order of the tables, dense first."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, [*AXES, *TEXTS, "block_runs"], lineterminator="\n")
        writer.writeheader()
        for key in sorted(scores, key=place):
            row = dict(zip(AXES, key, strict=True))
            writer.writerow(row | {"sparsity": f"{key[2]:g}"} | scores[key])
    os.replace(partial, file)


def place(key: Key) -> tuple[list[int], Key]:
    """Return what sorts cases as the constants are; what is not among them comes last."""
    known = (MODELS, ("", *PRUNERS), (0.0, *SPARSITIES), ("", *TOP_UPS))
    axes: Iterable[tuple[tuple[object, ...], object]] = zip(known, key, strict=True)
    return [values.index(v) if v in values else len(values) for values, v in axes], key


def excess(scores: Scores, cell: Cell, top_up: str, text: str) -> float | None:
    """Return ln(perplexity) - ln(dense perplexity), or None where the case is not finished."""
    ours, dense = scores.get((*cell, top_up)), scores.get((cell[0], "", 0.0, ""))
    return None if ours is None or dense is None else math.log(ours[text] / dense[text])


def geometric(values: Iterable[float]) -> float:
    """Return the geometric mean; NaN where there is none."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def ratios(
    scores: Scores, top_up: str, base: str, text: str, pruner: str = ""
) -> dict[Cell, float]:
    """Return the excess of a top-up over that of another, of every cell that has both above 0."""
    found = {}
    for cell in itertools.product(MODELS, (pruner,) if pruner else PRUNERS, SPARSITIES):
        ours, theirs = (excess(scores, cell, t, text) for t in (top_up, base))
        if ours is not None and theirs is not None and ours > 0 and theirs > 0:
            found[cell] = ours / theirs
    return found


def summary(scores: Scores, base: str, text: str) -> str:
    """Return a line per top-up: its excess over that of `base`, by pruner and over all cells."""
    rows = []
    for top_up in TOP_UPS:
        row: dict[str, Any] = {"top-up": top_up}
        for pruner in PRUNERS:
            known = ratios(scores, top_up, base, text, pruner).values()
            row[pruner] = geometric(known) if known else None
        every = ratios(scores, top_up, base, text)
        row |= {"all": geometric(every.values()), "cells": len(every)}
        row["worse"] = sum(v > 1 for v in every.values())
        worst = max(every, key=lambda c: every[c], default=None)
        row["worst"] = worst and "{:.3f} ({} {} {})".format(every[worst], *worst)
        if every:
            rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f", missingval="")


def perplexities(scores: Scores, text: str) -> str:
    """Return a line per model, pruner and sparsity: the perplexity of every top-up."""
    rows = []
    for cell in itertools.product(MODELS, PRUNERS, SPARSITIES):
        known = {t: scores[(*cell, t)][text] for t in TOP_UPS if (*cell, t) in scores}
        least = min(known.values(), default=None)
        row: dict[str, Any] = dict(zip(("model", "pruner", "sparsity"), cell, strict=True))
        for t in TOP_UPS:
            value = known.get(t)
            shown = "" if value is None else f"{value:.4g}"
            row[t] = f"**{shown}**" if value is not None and value == least else shown
        if known:
            rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def block_runs(scores: Scores) -> list[str]:
    """Return title and table of the block runs of every top-up; nothing where none are known."""
    pruned = [key for key in scores if key[1]]
    known = [(key[3], scores[key]["block_runs"]) for key in pruned if "block_runs" in scores[key]]
    spent = {t: [n for top_up, n in known if top_up == t] for t in TOP_UPS}
    cost = [(t, min(n), max(n)) for t, n in spent.items() if n]
    title = "Block runs, the final pruning included"
    if len(known) < len(pruned):
        title += f", of the {len(known)} cells where they are on record"
    table = tabulate(cost, headers=("top-up", "least", "most"), tablefmt="github")
    return [title, table] if cost else []


def tables(scores: Scores) -> str:
    """Return everything that finished cases say, as Markdown."""
    parts = [f"{sum(1 for key in scores if key[1])} finished cases."]
    for base in ("uniform", "neuroal"):
        for text in TEXTS:
            title = f"Excess on {text} divided by that of `{base}`, geometric means (1 = as good)"
            parts += [title, summary(scores, base, text)]
    parts += block_runs(scores)
    for text in TEXTS:
        dense = [(m, scores[(m, "", 0.0, "")][text]) for m in MODELS if (m, "", 0.0, "") in scores]
        known = ", ".join(f"{m} {value:.2f}" for m, value in dense)
        parts += [f"Perplexity on {text} (dense: {known})", perplexities(scores, text)]
    return "\n\n".join(parts)


def replaced(page: str, between: str) -> str:
    """Return a page with what stands between its markers replaced."""
    pattern = re.compile(r"(<!-- tables -->\n).*(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise click.UsageError("--out holds no markers <!-- tables --> and <!-- end -->")
    return pattern.sub(lambda m: f"{m[1]}\n{between}\n\n{m[2]}", page)


@click.command(help=__doc__)
@click.argument("shared", type=click.Path(path_type=Path, exists=True))
@click.option("--results", type=click.Path(path_type=Path), required=True)
@click.option("--model", "models", multiple=True, default=MODELS)
@click.option("--pruner", "pruners", multiple=True, default=PRUNERS)
@click.option("--sparsity", "sparsities", multiple=True, type=float, default=SPARSITIES)
@click.option("--top-up", "top_ups", multiple=True, default=TOP_UPS)
@click.option("--jobs", type=int, default=1, show_default=True, help="Cases at once.")
@click.option("--only-tables", is_flag=True, help="Run nothing.")
@click.option("--out", type=click.Path(path_type=Path, exists=True), help="Page with markers.")
def main(
    shared: Path, results: Path, jobs: int, only_tables: bool, out: Path | None, **axes: Any
) -> None:
    logging.disable(logging.WARNING)
    if not only_tables:
        results.mkdir(parents=True, exist_ok=True)
        file = results.with_name(results.name + ".toml")
        file.write_text(study(shared, **axes), encoding="utf-8")
        prepared = prepare(file, results)
        for result in tqdm(run(prepared, Execution(jobs=jobs)), total=len(prepared.jobs)):
            if result["error"]:
                tqdm.write(f"{result['case']}: {result['error']}")
    scores = read_scores(results)
    if out is None:
        click.echo(tables(scores))
        return
    record = out.with_suffix(".csv")
    scores = read_record(record) | scores
    if not scores:
        raise click.UsageError(f"there is no finished case in {results}, and no {record}")
    made = tables(scores)
    page = replaced(out.read_text(encoding="utf-8"), made)
    write_record(record, scores)
    out.write_text(page, encoding="utf-8")
    click.echo(made)


if __name__ == "__main__":
    main()
