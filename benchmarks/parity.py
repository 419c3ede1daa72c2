"""Compare every case of the authors' published code with this project's, and write a table.

    python benchmarks/parity.py SHARED --cases parity.jsonl --out docs/parity.md

SHARED is the folder that holds `models/llama`, `data/` and `reference/llama.json`. A case that
`--cases` has is not run again; `--pruner`, `--sparsity` and `--top-up` run a part of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

import neuroal
from neuroal import layout
from neuroal.evaluation.perplexity import evaluation_windows, perplexity
from neuroal.model import pretrained

TEXTS = {"wikitext2": "wikitext2.test.txt", "ptb": "ptb.test.txt"}
COLUMNS = [
    *("pruner", "sparsity", "top_up", "λ block", "λ row", "misalignment block", "misalignment row"),
    *("achieved", "same mask", "wikitext2", "wikitext2 theirs", "ptb", "ptb theirs"),
]
HEAD = """# Parity with the published code

What the authors' code chose on a Llama of 4 million weights, and what neuroal chooses under
`--budget paper`: 32 calibration windows of 256 tokens, the first 8 for the search. `misalignment`
is the largest relative difference over all candidates of a step, `achieved` the largest difference
of a block's sparsity; perplexities are those of 100 windows of 256 tokens.

The windows are the rows of `SHARED/reference/llama.calibration.jsonl`, the texts are
`SHARED/data/wikitext2.test.txt` and `SHARED/data/ptb.test.txt`, the model is `SHARED/models/llama`.
All of it is made by `OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 python benchmarks/parity.py SHARED
--out docs/parity.md`: one thread and one vector width, because sums in another order round
differently. One row (here Wanda, 0.6, `neuroal`) is

    OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 python benchmarks/parity.py SHARED \\
        --pruner wanda --sparsity 0.6 --top-up neuroal --cases one-row.jsonl

Every λ is the published one. Where a mask differs, the column `same mask` has the cause:

- *Rounding.* Of two scores that are nearly equal another one may go. SparseGPT feeds every
  difference forward through its updates, and DSnoT's published loop, which goes on exchanging
  weights in rows that are finished, makes many of one.
- *Clipping.* AlphaPruning's published code can ask for ratios above 1 and then prunes whole
  linears; here such ratios are clipped.
- *No reference.* DSnoT's published code on SparseGPT never fills the Gram matrix that its scores
  are made of, so its masks are no reference; here DSnoT starts from the mask that SparseGPT has
  made, and the weights that SparseGPT has moved stay so.

The reference holds digests of masks, not masks: how many bits differ cannot be counted.
"""
STEPS = {"block": "block_ratios", "row": "row_ratios"}


def mask_sha256(model: torch.nn.Module) -> str:
    """Return the digest of the zeros of all block linears as the reference defines it."""
    names = layout.find(model).linears
    zeros = [(model.get_submodule(n).weight == 0).flatten().cpu().numpy() for n in names]
    return hashlib.sha256(np.packbits(np.concatenate(zeros)).tobytes()).hexdigest()


def run_case(
    case: dict[str, Any], dense: torch.nn.Module, ids: torch.Tensor
) -> tuple[torch.nn.Module, neuroal.Report]:
    """Prune a copy of the dense model as the case says and return it with its report."""
    options: dict[str, dict[str, Any]] = {}
    if case["pruner"] == "sparsegpt":
        options["sparsegpt"] = {"published_code": True}
    if case["top_up"] == "dsnot":
        options["dsnot"] = {"published_code": True}
    if case["top_up"] == "alphapruning":
        options["alphapruning"] = {"published_code": True}
    recipe = neuroal.Recipe(
        sparsity=case["sparsity"],
        pruner=case["pruner"],
        top_up=case["top_up"],
        budget="paper",
        options=options,
    )
    model = copy.deepcopy(dense)
    return model, neuroal.prune(model, None, recipe, windows=ids)


def compare(
    case: dict[str, Any], model: torch.nn.Module, report: neuroal.Report, texts: dict[str, Any]
) -> dict[str, Any]:
    """Return one row of the table."""
    row: dict[str, Any] = {k: case[k] for k in ("pruner", "sparsity", "top_up")}
    for step, role in STEPS.items():
        theirs = case.get(f"lam_{step}")
        if theirs is None:
            continue
        measured = [c for c in report.candidates if c["role"] == role and c["parameters"]]
        lam = next((c["parameters"]["lam"] for c in measured if c["selected"]), None)
        row[f"λ {step}"] = f"{lam:g}" if lam == theirs else f"{lam} (theirs {theirs:g})"
        published = case[f"{step}_misalignments"]
        row[f"misalignment {step}"] = max(
            (abs(c["misalignment"] / published[str(c["parameters"]["lam"])] - 1) for c in measured),
            default=None,
        )
    achieved = [b["achieved"] for b in report.blocks]
    pairs = zip(achieved, case["achieved_per_block"], strict=True)
    row["achieved"] = max(abs(a - b) for a, b in pairs)
    same = mask_sha256(model) == case["mask_sha256"]
    row["same mask"] = "yes" if same else cause(case, row["achieved"])
    for name, windows in texts.items():
        row[f"{name}"] = perplexity(model, windows).perplexity
        row[f"{name} theirs"] = case[name]
    return row


def cause(case: dict[str, Any], achieved: float) -> str:
    """Return why a mask is another one, in the word that the page explains."""
    if case["top_up"] == "dsnot" and case["pruner"] == "sparsegpt":
        return "no reference"
    return "clipping" if case["top_up"] == "alphapruning" and achieved > 1e-3 else "rounding"


def key(case: dict[str, Any]) -> tuple[str, float, str]:
    """Return what a case is known by."""
    return case["pruner"], case["sparsity"], case["top_up"]


def page(rows: list[dict[str, Any]], failing: list[dict[str, Any]]) -> str:
    """Return the page of the documentation."""
    digits = {"misalignment": ".0e", "achieved": ".0e", "wikitext2": ".2f", "ptb": ".2f"}

    def cell(row: dict[str, Any], column: str) -> object:
        value, form = row.get(column), digits.get(column.split()[0], "")
        return "" if value is None else format(value, form)

    cells = [[cell(row, column) for column in COLUMNS] for row in rows]
    table = tabulate(cells, headers=COLUMNS, tablefmt="github", disable_numparse=True)
    fails = [f"- {c['pruner']}, {c['top_up']}, {c['sparsity']:g}\n" for c in failing]
    same = sum(row["same mask"] == "yes" for row in rows)
    pruners = ", ".join(dict.fromkeys(row["pruner"] for row in rows))
    count = f"{same} of {len(rows)} cases ({pruners}) end in the same mask, bit for bit.\n"
    return f"{HEAD}\n{count}\n{table}\n" + "".join(
        ["\nThe published code itself fails on\n\n", *fails]
    )


@click.command(help=__doc__)
@click.argument("shared", type=click.Path(path_type=Path, exists=True))
@click.option("--pruner", multiple=True)
@click.option("--sparsity", multiple=True, type=float)
@click.option("--top-up", multiple=True)
@click.option("--cases", "done_file", type=click.Path(path_type=Path), default="parity.jsonl")
@click.option("--out", type=click.Path(path_type=Path))
def main(
    shared: Path,
    pruner: tuple[str, ...],
    sparsity: tuple[float, ...],
    top_up: tuple[str, ...],
    done_file: Path,
    out: Path | None,
) -> None:
    logging.disable(logging.WARNING)
    wanted = [
        case
        for case in json.loads((shared / "reference/llama.json").read_text())["cases"]
        if (not pruner or case["pruner"] in pruner)
        and (not sparsity or case["sparsity"] in sparsity)
        and (not top_up or case["top_up"] in top_up)
    ]
    calibration = (shared / "reference/llama.calibration.jsonl").read_text().splitlines()
    ids = torch.tensor([json.loads(line)["input_ids"] for line in calibration])
    dense, tokenizer = pretrained.load(str(shared / "models/llama"))
    texts = {
        name: evaluation_windows(
            str(shared / "data" / f), tokenizer, length=256, windows=100, bos="never"
        )
        for name, f in TEXTS.items()
    }
    lines = done_file.read_text().splitlines() if done_file.exists() else []
    done = {key(row): row for row in map(json.loads, lines)}
    for case in tqdm([c for c in wanted if "error" not in c and key(c) not in done]):
        done[key(case)] = compare(case, *run_case(case, dense, ids), texts)
        with done_file.open("a") as file:
            file.write(json.dumps(done[key(case)], ensure_ascii=False) + "\n")
    rows = [done[key(case)] for case in wanted if key(case) in done]
    text = page(rows, [c for c in wanted if "error" in c])
    click.echo(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
