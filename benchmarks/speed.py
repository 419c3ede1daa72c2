"""Measure the published procedure, ours and the block runs alone, side by side.

    python benchmarks/speed.py MODEL... [--threads 1] [--repeats 3] [--out tables.md]

MODEL is a folder, or the name of a random Llama-structure model: `tiny`, `100m`, `1b`, or `7b`
(whose shapes, in bfloat16 with windows of 2048 tokens, are for a GPU). Pruner Wanda, sparsity 0.7,
NeuroAL with both steps, the published roundings. Every run has a process of its own; the three
take turns, `--repeats` times, and medians are reported. Ratios are of processor seconds on the
CPU, so that other work on the machine does not count, and of seconds on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from plain import Floor, Published
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import neuroal
from neuroal import layout
from neuroal.model import pretrained
from neuroal.pruning.masks import prune_rows, row_mask, zeroed
from neuroal.walk import batch_size
from neuroal_plugins.block_ratios.linear_schedule import LAMBDAS as BLOCK
from neuroal_plugins.row_ratios.neuroal import LAMBDAS as ROW

SPARSITY = 0.7
# hidden, intermediate, blocks, heads
RANDOM = {
    "tiny": (64, 160, 3, 4),
    "100m": (768, 2048, 12, 12),
    "1b": (2048, 8192, 16, 32),
    "7b": (4096, 11008, 32, 32),
}
WHAT = {
    "published": "published procedure (a)",
    "ours": "neuroal (b)",
    "floor": "block runs (c)",
    "bfloat16": "(b), --search-dtype bfloat16",
}
CUTS = ((768, 768), (2048, 768), (2048, 8192))
MASKS = ((512, 192), (768, 2048), (4096, 4096))


def load(name: str, device: str) -> nn.Module:
    """Return a model in evaluation mode: a folder's, or a random one."""
    if name not in RANDOM:
        return pretrained.load(name, device)[0]
    hidden, intermediate, blocks, heads = RANDOM[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        vocab_size=32000 if name == "7b" else 4096,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16 if device == "cuda" else torch.float32).to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    rng = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02, generator=rng)
    return model.eval()


def token_ids(name: str, model: nn.Module, samples: int, length: int) -> Tensor:
    """Return the reference windows beside a shared model, or random ids."""
    file = Path(name).parents[1] / "reference/llama.calibration.jsonl" if "/" in name else None
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (samples, length), generator=rng)
    if file is not None and file.exists() and Path(name).name == "llama":
        rows = [json.loads(line)["input_ids"] for line in file.read_text().splitlines()]
        ids = torch.tensor(rows)[:samples, :length]
    return ids


def grids(candidates: int | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the lambdas of both steps, evenly thinned out to so many each."""
    if candidates is None:
        return BLOCK, ROW
    return tuple(g[:: max(1, len(g) // candidates)][:candidates] for g in (BLOCK, ROW))  # type: ignore[return-value]


def measure(what: str, o: dict[str, Any]) -> dict[str, Any]:
    """Run one of the three once, without gradients, and return what it took."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(o["model"], device)
    ids = token_ids(o["model"], model, o["samples"], o["length"])
    block, row = grids(o["candidates"])
    result: dict[str, Any] = {}
    start, cpu = time.perf_counter(), time.process_time()
    if what == "published":
        made = Published(model, ids.to(device), o["search"])
        result["lam"] = list(made.prune(SPARSITY, block, row))
        result["block_runs"] = made.block_runs
    elif what == "floor":
        batch = batch_size(torch.device(device), o["length"])
        floor = Floor(model, ids.to(device), o["search"], batch)
        floor.prune([len(block), len(row)])
        result["block_runs"] = floor.block_runs
    else:
        options = {"linear_schedule": {"lambdas": block}, "neuroal": {"lambdas": row}}
        recipe = neuroal.Recipe(
            sparsity=SPARSITY,
            budget="paper",
            options=options,
            search_samples=o["search"],
            search_dtype="bfloat16" if what == "bfloat16" else "auto",
        )
        report = neuroal.prune(model, None, recipe, windows=ids)
        chosen = report.selected()
        result["lam"] = [chosen[r]["parameters"]["lam"] for r in ("block_ratios", "row_ratios")]
        result["block_runs"] = report.counts["block_runs"]
        result["phases"] = report.timings
    if device == "cuda":
        torch.cuda.synchronize()
    result["cpu"] = time.process_time() - cpu
    result["seconds"] = time.perf_counter() - start
    if what != "floor":
        mask = zeros(model)
        result["sha256"] = hashlib.sha256(mask).hexdigest()
        if "zeros" in o:
            np.save(o["zeros"], mask)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["memory"] = torch.cuda.max_memory_allocated() if device == "cuda" else peak
    return result


def zeros(model: nn.Module) -> Any:
    """Return where all linears are zero, in order, eight weights a byte."""
    names = layout.find(model).linears
    weights = [model.get_submodule(name).weight.flatten() for name in names]
    return np.packbits(np.concatenate([(w == 0).cpu().numpy() for w in weights]))


def compare(
    o: dict[str, Any], repeats: int, tell: Callable[[str], None], folder: Path
) -> list[dict[str, Any]]:
    """Let them take turns and return a row of the table for each; masks are put into a folder."""
    runs: dict[str, list[dict[str, Any]]] = {what: [] for what in WHAT}
    for _ in range(repeats):
        for what in WHAT:
            if what in o["skip"]:
                continue
            given = {"what": what, "zeros": str(folder / f"{what}.npy"), **o}
            command = [sys.executable, __file__, "--once", json.dumps(given)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[what].append(json.loads(done.stdout.splitlines()[-1]))
            tell(f"{o['model']} {what}: {json.dumps(runs[what][-1])}")
    clock = "seconds" if torch.cuda.is_available() else "cpu"
    rows = []
    for what, made in runs.items():
        if not made:
            continue
        row: dict[str, Any] = {"model": Path(o["model"]).name, "what": WHAT[what]}
        for key in ("seconds", "cpu"):
            row["processor seconds" if key == "cpu" else key] = statistics.median(
                r[key] for r in made
            )
        for title, other in (("× (a)", "published"), ("× (c)", "floor")):
            pairs = zip(made, runs[other], strict=False)  # none where the other is left out
            ratios = [mine[clock] / theirs[clock] for mine, theirs in pairs]
            row[title] = statistics.median(ratios) if ratios else None
        row["block runs"] = made[0]["block_runs"]
        row["peak MB"] = round(statistics.median(r["memory"] for r in made) / 1e6)
        row["λ"] = ", ".join(f"{x:g}" for x in made[0].get("lam", ()))
        found, published = folder / f"{what}.npy", folder / "published.npy"
        if what != "published" and found.exists() and published.exists():
            other = np.bitwise_xor(np.load(found), np.load(published))
            row["weights masked unlike (a)"] = int(np.unpackbits(other).sum())
        rows.append(row)
    return rows


def masks(shapes: tuple[tuple[int, int], ...], repeats: int) -> list[dict[str, Any]]:
    """Time ways to find the same mask; refuse to go on where two differ."""
    rows = []
    for shape in shapes:
        rng = torch.Generator().manual_seed(0)
        scores = torch.rand(shape, generator=rng)
        k = int(shape[1] * SPARSITY)
        same, own = torch.full((shape[0],), k), torch.randint(k, (shape[0],), generator=rng)
        ways: dict[str, Callable[[], Tensor]] = {
            "row_mask": lambda s=scores, n=same: row_mask(s, n),
            "torch.sort": lambda s=scores, k=k: _scattered(s, s.sort(dim=1).indices[:, :k]),
            "torch.topk": lambda s=scores, k=k: _scattered(s, s.topk(k, 1, largest=False).indices),
            "torch.kthvalue": lambda s=scores, k=k: s <= s.kthvalue(k, 1, keepdim=True).values,
        }
        for name, way in ways.items():
            assert way().equal(ways["torch.sort"]()), f"{name} finds another mask"
        ways["row_mask, a count per row"] = lambda s=scores, n=own: row_mask(s, n)
        row = {"scores": f"{shape[0]} × {shape[1]}"}
        for name, way in ways.items():
            row[f"{name}, ns a weight"] = f"{_fastest(way, repeats) / scores.numel() * 1e9:.1f}"
        rows.append(row)
    return rows


def cuts(shapes: tuple[tuple[int, int], ...], repeats: int) -> list[dict[str, Any]]:
    """Time Wanda's pruning of a weight, all of it at a time and a few rows at a time."""
    rows = []
    for shape in shapes:
        rng = torch.Generator().manual_seed(0)
        weight, norm = torch.randn(shape, generator=rng), torch.rand(shape[1], generator=rng)
        k = int(shape[1] * SPARSITY)
        same, own = torch.full((shape[0],), k), torch.randint(k, (shape[0],), generator=rng)
        row = {"weight": f"{shape[0]} × {shape[1]}"}
        for title, n in (("", same), (", a count per row", own)):
            ways: dict[str, Callable[[], Tensor]] = {
                "whole": lambda w=weight, x=norm, n=n: zeroed(w, row_mask(w.abs() * x, n)),
                "few rows": lambda w=weight, x=norm, n=n: prune_rows(w, x, n)[0],
            }
            assert ways["whole"]().equal(ways["few rows"]()), "two ways to prune differ"
            for name, way in ways.items():
                nanoseconds = _fastest(way, repeats) / weight.numel() * 1e9
                row[f"{name}{title}, ns a weight"] = f"{nanoseconds:.1f}"
        rows.append(row)
    return rows


def _scattered(scores: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, True)


def _fastest(way: Callable[[], Tensor], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        way()
        times.append(time.process_time() - start)
    return statistics.median(times)


def hardware(threads: int) -> str:
    """Return the machine in a line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif info.exists():
        names = [x.split(": ")[1] for x in info.read_text().splitlines() if "model name" in x]
        name = names[0] if names else name
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}), {threads} thread(s), torch {torch.__version__}, {date.today()}"


@click.command(help=__doc__)
@click.argument("models", nargs=-1)
@click.option("--threads", default=1, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--search", type=int, default=8, show_default=True, help="Search windows.")
@click.option("--samples", type=int, help="Calibration windows; 32, or 128 for 7b.")
@click.option("--length", type=int, help="Tokens of a window; 256, or 2048 for 7b.")
@click.option("--candidates", type=int, help="So many λ a step in place of all.")
@click.option("--skip", multiple=True, type=click.Choice(list(WHAT)), help="Leave one out.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the page here.")
@click.option("--once", hidden=True, help="One run, for the command itself.")
def main(models: tuple[str, ...], out: Path | None, once: str | None, **given: Any) -> None:
    if once is not None:
        o = json.loads(once)
        torch.set_num_threads(o["threads"])
        torch.set_grad_enabled(False)
        logging.disable(logging.WARNING)
        click.echo(json.dumps(measure(o.pop("what"), o)))
        return
    repeats, rows = given.pop("repeats"), []
    for model in models:
        large = model == "7b"
        o = {**given, "model": model}
        o["samples"] = o["samples"] or (128 if large else 32)
        o["length"] = o["length"] or (2048 if large else 256)
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(o, repeats, tqdm.write, Path(folder))
    torch.set_num_threads(given["threads"])
    shapes = MASKS if out else MASKS[:1]
    parts = [
        "# Benchmarks",
        f"Made by `python benchmarks/speed.py {' '.join(Path(m).name for m in models)}`: "
        f"{hardware(given['threads'])}. Wanda, sparsity {SPARSITY}, NeuroAL with both steps and "
        f"the final pruning; {repeats} runs of each, medians.",
        tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g", missingval=""),
        "Masks, processor time:",
        tabulate(masks(shapes, 5), headers="keys", tablefmt="github"),
        "Score, select and cut, processor time:",
        tabulate(cuts(CUTS if out else CUTS[:1], 5), headers="keys", tablefmt="github"),
    ]
    text = "\n\n".join(parts) + "\n"
    click.echo(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
