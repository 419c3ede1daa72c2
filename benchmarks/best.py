"""Compare the presets `best` and `best-slow` with the paper's NeuroAL, and write a table.

    python benchmarks/best.py SHARED --cases best.jsonl [--model llama] [--pruner wanda]
        [--sparsity 0.7] [--top-up best] [--out docs/best.md]

SHARED is the folder that holds `models/` and `data/`. Every case is one line of the cases file;
a case that is there already is not run again, so that the command can be stopped and repeated.
Calibration: 32 windows of 256 tokens of `data/calibration.jsonl`, the first 8 for the search,
exact budget. Perplexity: the first 100 windows of 256 tokens of each text.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from tqdm import tqdm

import neuroal
from neuroal import calibration, checkpoint
from neuroal.evaluation.perplexity import evaluation_windows, perplexity

MODELS = ("llama", "mistral", "phi", "opt")
PRUNERS = ("magnitude", "wanda", "sparsegpt")
SPARSITIES = (0.6, 0.7, 0.8)
TOP_UPS = ("uniform", "neuroal", "owl", "best", "best-slow")
TEXTS = {"wikitext2": "wikitext2.test.txt", "ptb": "ptb.test.txt", "heldout": "heldout.jsonl"}
LENGTH, SAMPLES, WINDOWS = 256, 32, 100

Case = dict[str, Any]
Key = tuple[str, str, float, str]


def key_of(case: Mapping[str, Any]) -> Key:
    """Return what tells a case from the others."""
    return case["model"], case["pruner"], case["sparsity"], case["top_up"]


def read_cases(path: Path) -> dict[Key, Case]:
    """Return the finished cases of a file; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {key_of(case): case for case in map(json.loads, lines)}


class Bench:
    """One dense model with its calibration windows and texts."""

    def __init__(self, shared: Path, name: str) -> None:
        self.name = name
        self.model, tokenizer = checkpoint.load(str(shared / "models" / name))
        self.ids = calibration.calibration_windows(
            str(shared / "data/calibration.jsonl"), tokenizer, samples=SAMPLES, length=LENGTH
        ).ids
        self.texts = {
            text: evaluation_windows(
                str(shared / "data" / file), tokenizer, length=LENGTH, windows=WINDOWS
            )
            for text, file in TEXTS.items()
        }

    def run(self, pruner: str, sparsity: float, top_up: str) -> Case:
        """Prune a copy and measure it."""
        model, seconds, counts = copy.deepcopy(self.model), 0.0, {}
        if top_up != "dense":
            recipe = neuroal.Recipe(sparsity=sparsity, pruner=pruner, top_up=top_up)
            start = time.perf_counter()
            report = neuroal.prune(model, None, recipe, windows=self.ids)
            seconds = time.perf_counter() - start
            chosen = [c for c in report.candidates if c["selected"]]
            counts = {
                "achieved": report.sparsity["achieved"],
                "block_runs": report.counts["block_runs"],
                "candidates": len(report.candidates),
                "chosen": {c["role"]: c["parameters"] for c in chosen},
                "misalignment": [c["misalignment"] for c in chosen],
                "ratios": [round(x["achieved"], 4) for x in report.linears.values()],
            }
        return {
            "model": self.name,
            "pruner": pruner,
            "sparsity": sparsity,
            "top_up": top_up,
            **{text: perplexity(model, windows).perplexity for text, windows in self.texts.items()},
            "seconds": round(seconds, 1),
            **counts,
        }


def excess(cases: Mapping[Key, Case], key: Key, text: str) -> float | None:
    """Return ln(perplexity) - ln(dense perplexity), or None where the case has not been run."""
    dense = cases.get((key[0], "none", 0.0, "dense"))
    case = cases.get(key)
    return None if case is None or dense is None else math.log(case[text] / dense[text])


def geometric(values: Iterable[float]) -> float:
    """Return the geometric mean; NaN where there is none."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def summary(cases: Mapping[Key, Case], cells: Sequence[tuple[str, str, float]]) -> str:
    """Return a line per preset and text: geometric means, and the worst cell against uniform."""
    rows = []
    for top_up, text in itertools.product(TOP_UPS, TEXTS):
        against: dict[str, dict[str, float]] = {"neuroal": {}, "uniform": {}}
        for cell, base in itertools.product(cells, against):
            ours, theirs = (excess(cases, (*cell, t), text) for t in (top_up, base))
            if ours is not None and theirs is not None and ours > 0 and theirs > 0:
                against[base]["{} {} {}".format(*cell)] = ours / theirs
        if top_up == "neuroal" and not against["uniform"]:
            continue
        worst = max(against["uniform"], key=lambda c: against["uniform"][c], default=None)
        runs = [cases[(*c, top_up)]["block_runs"] for c in cells if (*c, top_up) in cases]
        rows.append(
            {
                "top-up": top_up,
                "text": text,
                "cells": len(against["neuroal"]),
                "excess / NeuroAL's": geometric(against["neuroal"].values()),
                "excess / uniform's": geometric(against["uniform"].values()),
                "worse than uniform": sum(v > 1 for v in against["uniform"].values()),
                "worst against uniform": worst and f"{against['uniform'][worst]:.3f} ({worst})",
                "block runs": f"{min(runs)} to {max(runs)}" if runs else "",
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f")


def details(cases: Mapping[Key, Case], cells: Sequence[tuple[str, str, float]], text: str) -> str:
    """Return a line per cell: perplexities, and the excess of both presets against NeuroAL's."""
    rows = []
    for cell in cells:
        row: dict[str, Any] = dict(zip(("model", "pruner", "sparsity"), cell, strict=True))
        for top_up in TOP_UPS:
            case = cases.get((*cell, top_up))
            row[top_up] = None if case is None else case[text]
        base = excess(cases, (*cell, "neuroal"), text)
        for top_up in ("best", "best-slow"):
            ours = excess(cases, (*cell, top_up), text)
            row[f"{top_up} / neuroal"] = ours / base if ours is not None and base else None
        if any(row[t] is not None for t in TOP_UPS):
            rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4g", missingval="")


@click.command(help=__doc__)
@click.argument("shared", type=click.Path(path_type=Path, exists=True))
@click.option("--cases", "file", type=click.Path(path_type=Path), required=True)
@click.option("--model", "models", multiple=True, default=MODELS)
@click.option("--pruner", "pruners", multiple=True, default=PRUNERS)
@click.option("--sparsity", "sparsities", multiple=True, type=float, default=SPARSITIES)
@click.option("--top-up", "top_ups", multiple=True, default=TOP_UPS)
@click.option("--only-table", is_flag=True, help="Run nothing.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the tables here.")
def main(
    shared: Path,
    file: Path,
    models: tuple[str, ...],
    pruners: tuple[str, ...],
    sparsities: tuple[float, ...],
    top_ups: tuple[str, ...],
    only_table: bool,
    out: Path | None,
) -> None:
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    cases = read_cases(file)
    for name in () if only_table else models:
        wanted: list[Key] = [(name, "none", 0.0, "dense")]
        wanted += [(name, *rest) for rest in itertools.product(pruners, sparsities, top_ups)]
        missing = [key for key in wanted if key not in cases]
        bench = Bench(shared, name) if missing else None
        for key in tqdm(missing, desc=name):
            assert bench is not None
            case = bench.run(*key[1:])
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(case) + "\n")
            cases[key] = case
    cells = list(itertools.product(MODELS, PRUNERS, SPARSITIES))
    dense = {
        m: cases[(m, "none", 0.0, "dense")] for m in MODELS if (m, "none", 0.0, "dense") in cases
    }
    parts = [summary(cases, cells)]
    for text in TEXTS:
        known = ", ".join(f"{m} {case[text]:.2f}" for m, case in dense.items())
        parts += [f"Perplexity on {text} (dense: {known})", details(cases, cells, text)]
    click.echo("\n\n".join(parts))
    if out is not None:
        out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
