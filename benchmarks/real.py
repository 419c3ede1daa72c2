"""Methods on real models: what they cost, and what is left of the model; docs/real-models.md.

    python benchmarks/real.py MODELS DATA --results FOLDER [--model smollm2] [--only TEXT]
    python benchmarks/real.py MODELS DATA --results FOLDER --only-tables --out docs/real-models.md

MODELS is a folder of checkpoints, among them `smollm2` and `gemma3`; DATA holds
`calibration.jsonl`, `wikitext2.test.txt`, `ptb.test.txt`, `heldout.jsonl` and
`zeroshot/continuations.jsonl` (which of four endings goes on from a text; needs neuroal[eval]).
Every cell is a process of its own, so that its processor seconds and its peak memory are its own;
one that FOLDER holds is not run again, so that the command can be stopped and repeated.
Calibration: 32 windows of 128 tokens (8 or 128 where a cell says so), the first 8 for a search.
Perplexity: the first 40 windows of 256 tokens of each text; accuracy: of the first 200
continuations. All in float32, on one thread.

With --out, cells of FOLDER are merged into the record, the .csv beside --out, and tables of the
whole record replace what stands between the markers of --out.
"""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import click
from results import replaced
from tabulate import tabulate
from tqdm import tqdm

from neuroal.plugins import load_top_up

TEXTS = {"wikitext2": "wikitext2.test.txt", "ptb": "ptb.test.txt", "heldout": "heldout.jsonl"}
ZERO_SHOT, ASKED = "continuations", 200
# What the beginning made likelier tells endings of different texts apart best.
TASK = {
    "task": ZERO_SHOT,
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{ctx}}",
    "doc_to_choice": "{{endings}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc_mutual_info"}],
    "metadata": {"version": 1.0},
}
MODELS = ("smollm2", "gemma3")
COSTS = ("block_runs", "seconds", "mebibytes")
EFFORTS = ("low", "medium", "high", "max")


@dataclass(frozen=True)
class Cell:
    """One row of the table; without a pruner it is the dense model."""

    model: str
    sparsity: str = ""  # 0.6, or 2:4
    pruner: str = ""
    top_up: str = ""
    reconstruction: str = "none"
    windows: str = ""  # of calibration, where they are not 32

    @classmethod
    def of(cls, model: str, sparsity: str, effort: str, windows: str = "") -> Cell:
        """Return the cell of an effort, which brings its pruner and its reconstruction."""
        return cls(model, sparsity, load_top_up(effort).pruner or "", effort, "", windows)

    @property
    def file(self) -> str:
        """Return the name of its result."""
        return "-".join(str(x).replace(":", "of") for x in astuple(self) if x) + ".json"

    def recipe(self) -> dict[str, Any]:
        """Return the fields of its recipe."""
        pattern = ":" in self.sparsity
        own: dict[str, Any] = {"pattern": self.sparsity} if pattern else {}
        own |= {} if pattern else {"sparsity": float(self.sparsity)}
        own |= {"pruner": self.pruner, "top_up": self.top_up}
        own |= {"samples": int(self.windows or 32), "length": 128}
        # The efforts bring their own.
        return own | ({} if self.top_up in EFFORTS else {"reconstruction": self.reconstruction})


def cells(model: str) -> Iterator[Cell]:
    """Yield the cells of one model, the most telling first: some hours of one core together."""
    yield Cell(model)
    yield Cell(model, "0.6", "wanda", "uniform")
    yield Cell(model, "0.6", "wanda", "neuroal")
    for effort in EFFORTS:
        yield Cell.of(model, "0.6", effort)
    yield Cell(model, "2:4", "wanda", "uniform")
    yield Cell.of(model, "2:4", "high")
    yield Cell.of(model, "2:4", "max")
    yield Cell(model, "0.6", "wanda", "neuroal-fast")
    yield Cell(model, "0.6", "wanda", "best")
    yield Cell.of(model, "0.6", "low", "8")
    for effort in ("low", "medium", "high"):
        yield Cell.of(model, "0.6", effort, "128")
    for pruner in ("admm", "alps"):
        for reconstruction in ("none", "refit"):
            yield Cell(model, "0.6", pruner, "uniform", reconstruction)
    yield Cell(model, "0.6", "wanda", "uniform", "block")
    yield Cell(model, "2:4", "alps", "uniform")
    yield Cell.of(model, "2:4", "low")
    yield Cell(model, "0.6", "wanda", "owl")
    for reconstruction in ("none", "refit"):
        yield Cell(model, "0.6", "sparsegpt", "uniform", reconstruction)
        yield Cell(model, "0.6", "magnitude", "uniform", reconstruction)
    yield Cell(model, "0.5", "wanda", "uniform")
    for effort in ("low", "medium", "high"):
        yield Cell.of(model, "0.5", effort)


def measure(cell: Cell, models: Path, data: Path) -> dict[str, Any]:
    """Return what a cell costs, the perplexity of every text, and the zero-shot accuracy."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import neuroal

    torch.set_num_threads(1)
    path = models / cell.model
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found: dict[str, Any] = {}
    if cell.pruner:
        started = time.process_time()
        calibration = str(data / "calibration.jsonl")
        report = neuroal.prune(model, tokenizer, calibration=calibration, **cell.recipe())
        found["seconds"] = round(time.process_time() - started, 1)
        found["mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        found["block_runs"] = report.counts["block_runs"]
        found["notes"] = report.notes
    for label, file in TEXTS.items():
        measured = neuroal.evaluate(model, tokenizer, str(data / file), length=256, windows=40)
        found[label] = measured.perplexity.perplexity
    file = str(data / f"zeroshot/{ZERO_SHOT}.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        task = json.dumps(TASK | {"dataset_kwargs": {"data_files": {"test": file}}})
        (Path(folder) / f"{ZERO_SHOT}.yaml").write_text(task, encoding="utf-8")  # JSON is YAML
        asked = neuroal.evaluate(
            model, tokenizer, tasks=ZERO_SHOT, include_path=folder, limit=ASKED
        )
    found[ZERO_SHOT] = asked.zero_shot.accuracy
    return found


def run(cell: Cell, models: Path, data: Path, results: Path) -> None:
    """Measure a cell in a process of its own, and keep the result."""
    command = [sys.executable, __file__, str(models), str(data), "--results", str(results)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--one", json.dumps(asdict(cell))], check=True, env=environment)


def keep(cell: Cell, models: Path, data: Path, results: Path) -> None:
    """Measure a cell here and write its result in one step."""
    found = asdict(cell) | measure(cell, models, data)
    partial = results / f"{cell.file}.partial"
    partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(partial, results / cell.file)


def read_record(file: Path) -> dict[Cell, dict[str, float]]:
    """Return the numbers of every cell of a record; nothing where there is none."""
    found: dict[Cell, dict[str, float]] = {}
    if file.exists():
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                cell = Cell(*(row.pop(key) for key in asdict(Cell(""))))
                found[cell] = {key: json.loads(value) for key, value in row.items() if value}
    return found


def read_results(folder: Path) -> dict[Cell, dict[str, float]]:
    """Return the numbers of every cell of a results folder."""
    found: dict[Cell, dict[str, float]] = {}
    for file in sorted(folder.glob("*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        cell = Cell(*(row[key] for key in asdict(Cell(""))))
        found[cell] = {key: row[key] for key in (*TEXTS, ZERO_SHOT, *COSTS) if key in row}
    return found


def write_record(file: Path, record: dict[Cell, dict[str, float]]) -> None:
    """Write a record in one step, in the order of the cells."""
    order = [cell for model in MODELS for cell in cells(model)]
    known = [cell for cell in order if cell in record]
    rest = sorted((cell for cell in record if cell not in known), key=astuple)
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as lines:
        columns = (*asdict(Cell("")), *TEXTS, ZERO_SHOT, *COSTS)
        writer = csv.DictWriter(lines, columns, lineterminator="\n")
        writer.writeheader()
        for cell in (*known, *rest):
            writer.writerow(asdict(cell) | record[cell])
    os.replace(partial, file)


def tables(record: dict[Cell, dict[str, float]]) -> str:
    """Return a table per model and sparsity, as Markdown: a line per method, the best first."""
    parts = []
    for model in dict.fromkeys(cell.model for cell in record):
        dense = record.get(Cell(model))
        if dense is None:
            continue
        known = ", ".join(f"{text} {dense[text]:.2f}" for text in TEXTS)
        answered = f"; zero-shot {dense[ZERO_SHOT]:.3f}" if ZERO_SHOT in dense else ""
        parts.append(f"## {model}\n\nDense perplexity: {known}{answered}.")
        for sparsity in dict.fromkeys(x.sparsity for x in record if x.model == model and x.pruner):
            rows = [
                (cell, numbers)
                for cell, numbers in record.items()
                if (cell.model, cell.sparsity) == (model, sparsity)
            ]
            rows.sort(key=lambda row: excess(row[1], dense, "heldout"))
            lines = [_line(cell, numbers, dense) for cell, numbers in rows]
            table = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
            parts.append(f"### {sparsity}\n\n{table}")
    return "\n\n".join(parts)


def excess(numbers: dict[str, float], dense: dict[str, float], text: str) -> float:
    """Return ln(perplexity) - ln(dense perplexity)."""
    return math.log(numbers[text] / dense[text])


def _line(cell: Cell, numbers: dict[str, float], dense: dict[str, float]) -> dict[str, str]:
    own = cell.top_up in EFFORTS
    method = f"`--effort {cell.top_up}`" if own else f"{cell.pruner}, {cell.top_up}"
    more = "" if own or cell.reconstruction == "none" else f", {cell.reconstruction}"
    more += f", {cell.windows} windows" if cell.windows else ""
    line = {"method": method + more}
    for text in TEXTS:
        line[text] = f"{numbers[text]:.1f} ({excess(numbers, dense, text):.2f})"
    line["zero-shot"] = f"{numbers[ZERO_SHOT]:.3f}" if ZERO_SHOT in numbers else ""
    line["block runs"] = f"{numbers['block_runs']:,.0f}"
    line["processor s"] = f"{numbers['seconds']:.0f}"
    return line | {"peak MiB": f"{numbers['mebibytes']:,.0f}"}


@click.command(help=__doc__)
@click.argument("models", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--results", type=click.Path(path_type=Path), required=True)
@click.option("--model", "names", multiple=True, default=MODELS)
@click.option("--only", default="", help="Run the cells alone whose file's name holds this.")
@click.option("--only-tables", is_flag=True, help="Run nothing.")
@click.option("--out", type=click.Path(path_type=Path, exists=True), help="Page with markers.")
@click.option("--one", hidden=True)
def main(
    models: Path,
    data: Path,
    results: Path,
    names: tuple[str, ...],
    only: str,
    only_tables: bool,
    out: Path | None,
    one: str | None,
) -> None:
    results.mkdir(parents=True, exist_ok=True)
    if one is not None:
        keep(Cell(**json.loads(one)), models, data, results)
        return
    wanted = [cell for name in names for cell in cells(name) if only in cell.file]
    left = [cell for cell in wanted if not (results / cell.file).exists()]
    for cell in tqdm([] if only_tables else left, initial=len(wanted) - len(left)):
        tqdm.write(cell.file)
        run(cell, models, data, results)
    record = read_results(results)
    if out is not None:
        file = out.with_suffix(".csv")
        record = read_record(file) | record
        write_record(file, record)
        out.write_text(replaced(out.read_text(encoding="utf-8"), tables(record)), encoding="utf-8")
    click.echo(tables(record))


if __name__ == "__main__":
    main()
