"""Plot what a search costs against blocks, candidates and tokens, each over a factor of 8.

    python benchmarks/scaling.py [--out docs/assets/cost.svg] [--repeats 3]

A small random Llama-structure model on the CPU, NeuroAL's block step; processor seconds, medians.
Needs matplotlib.
"""

from __future__ import annotations

import io
import logging
import statistics
import time
from pathlib import Path

import click
import matplotlib
import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import neuroal

HIDDEN, FEED_FORWARD, HEADS, LENGTH = 192, 512, 6, 128
DARK = "@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg) } }\n"
MIDDLE = {"blocks": 4, "candidates": 4, "tokens": 1024}
SWEEPS = {
    "blocks": (2, 4, 8, 16),
    "candidates": (2, 4, 8, 16),
    "tokens": (512, 1024, 2048, 4096),
}


def seconds(blocks: int, candidates: int, tokens: int) -> tuple[float, int]:
    """Return processor seconds and block runs of one search."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config).eval()
    windows = tokens // LENGTH
    ids = torch.randint(3, 256, (windows, LENGTH))
    lambdas = tuple(0.01 * (k + 1) for k in range(candidates))
    recipe = neuroal.Recipe(
        sparsity=0.7,
        top_up="neuroal-block",
        search_samples=windows,
        options={"linear_schedule": {"lambdas": lambdas}},
    )
    start = time.process_time()
    report = neuroal.prune(model, None, recipe, windows=ids)
    spent = time.process_time() - start
    return spent, report.counts["block_runs"]


def measure(repeats: int) -> dict[str, list[tuple[int, float, int]]]:
    """Return (value, seconds, block runs) of every sweep."""
    found: dict[str, list[tuple[int, float, int]]] = {name: [] for name in SWEEPS}
    for name, values in SWEEPS.items():
        for value in tqdm(values, desc=name):
            runs = [seconds(**{**MIDDLE, name: value}) for _ in range(repeats)]
            found[name].append((value, statistics.median(s for s, _ in runs), runs[0][1]))
    return found


def plot(found: dict[str, list[tuple[int, float, int]]], out: Path) -> None:
    """Write one panel a sweep: measured points, and the line of least squares."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "neuroal"  # the same file from the same numbers
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(9, 3), layout="constrained")
    for panel, (name, points) in zip(panels, found.items(), strict=True):
        x, y, _ = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        slope, offset = np.polyfit(x, y, 1)
        panel.plot(x, slope * x + offset, color="0.7", label="least squares")
        panel.plot(x, y, "o", label="measured")
        panel.set(xlabel=name, xlim=(0, None), ylim=(0, None))
        panel.set_title(f"R² = {np.corrcoef(x, y)[0, 1] ** 2:.4f}", fontsize=9)
    panels[0].set_ylabel("processor seconds")
    panels[0].legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    style = '<style type="text/css">'
    out.write_text(text.getvalue().replace(style, style + DARK, 1), encoding="utf-8")


@click.command(help=__doc__)
@click.option("--repeats", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the plot here.")
def main(repeats: int, out: Path | None) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    seconds(**{**MIDDLE, "tokens": 512})  # what loads on first use
    found = measure(repeats)
    for name, points in found.items():
        for value, spent, runs in points:
            click.echo(f"{name} {value}: {spent:.2f} s, {runs} block runs")
    if out is not None:
        plot(found, out)


if __name__ == "__main__":
    main()
