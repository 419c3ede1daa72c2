"""Every pruner with every top-up on four models, as a study, and what it says in tables.

    python benchmarks/results.py SHARED --results FOLDER [--pruner wanda] [--top-up best] [--jobs 2]
    python benchmarks/results.py SHARED --results FOLDER --only-tables --out docs/results.md

SHARED is the folder that holds `models/` and `data/`. A case that FOLDER holds is not run again, so
that the command can be stopped, narrowed and repeated. Calibration: 32 windows of 256 tokens of
`data/calibration.jsonl`, the first 8 for the search (all for that of best-slow), exact budget.
Perplexity: the first 100 windows of 256 tokens of each text. Tables replace what stands between the
markers of --out.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from neuroal.study.run import How, prepare, run

MODELS = ("llama", "mistral", "phi", "opt")
PRUNERS = ("magnitude", "wanda", "sparsegpt", "multiflow", "ria", "admm", "alps")
TOP_UPS = (
    "uniform", "neuroal-block", "neuroal-row", "neuroal", "owl", "dlp", "alphapruning", "dsnot",
    "best", "best-slow",
)  # fmt: skip
SPARSITIES = (0.6, 0.7, 0.8)
TEXTS = {"wikitext2": "wikitext2.test.txt", "ptb": "ptb.test.txt", "heldout": "heldout.jsonl"}

Cell = tuple[str, str, float]
Scores = dict[tuple[str, str, float, str], dict[str, float]]
"""Perplexity by text, of (model, pruner, sparsity, top-up); ("llama", "", 0.0, "") is dense."""


def study(shared: Path, **axes: Sequence[Any]) -> str:
    """Return the study file of some models, pruners, top-ups and sparsities."""
    models = [str(shared.resolve() / "models" / name) for name in axes.pop("models")]
    lines = [f"models = {json.dumps(models)}"]
    lines += [f"{axis} = {json.dumps(list(values))}" for axis, values in axes.items()]
    source = json.dumps(str(shared.resolve() / "data/calibration.jsonl"))
    lines += ["[calibration]", f"source = {source}", "samples = 32"]
    lines += ["length = 256"]
    for label, file in TEXTS.items():
        data = json.dumps(str(shared.resolve() / "data" / file))
        lines += ["[[evaluations]]", f'label = "{label}"', f"data = {data}"]
        lines += ["length = 256", "windows = 100"]
    return "\n".join(lines) + "\n"


def read_scores(folder: Path) -> tuple[Scores, dict[tuple[str, str, float, str], int]]:
    """Return the perplexities and the block runs of every finished case in a results folder."""
    scores: Scores = {}
    runs = {}
    for file in (folder / "cases").glob("*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["status"] != "done":
            continue
        case = result["case"]
        key = (case["model"], case["pruner"] or "", case["sparsity"], case["top_up"] or "")
        scores[key] = {text: float(x["value"]) for text, x in result["scores"].items()}
        if result["report"] is not None:
            runs[key] = result["report"]["counts"]["block_runs"]
    return scores, runs


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


def tables(folder: Path) -> str:
    """Return everything that a results folder says, as Markdown."""
    scores, runs = read_scores(folder)
    pruned = sum(1 for key in scores if key[1])
    parts = [f"{pruned} finished cases."]
    for base in ("uniform", "neuroal"):
        for text in TEXTS:
            title = f"Excess on {text} divided by that of `{base}`, geometric means (1 = as good)"
            parts += [title, summary(scores, base, text)]
    spent = {t: [n for key, n in runs.items() if key[3] == t] for t in TOP_UPS}
    cost = [(t, min(n), max(n)) for t, n in spent.items() if n]
    parts += [
        "Block runs, the final pruning included",
        tabulate(cost, headers=("top-up", "least", "most"), tablefmt="github"),
    ]
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
        file = results.with_suffix(".toml")
        file.write_text(study(shared, **axes), encoding="utf-8")
        prepared = prepare(file, results)
        for result in tqdm(run(prepared, How(jobs=jobs)), total=len(prepared.jobs)):
            if result["error"]:
                tqdm.write(f"{result['case']}: {result['error']}")
    made = tables(results)
    click.echo(made)
    if out is not None:
        out.write_text(replaced(out.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
