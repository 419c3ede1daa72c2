"""How often the host waits for a device, in each block: `python benchmarks/waits.py`.

Runs methods on random models of two and of four blocks on the simulated device of
`neuroal.testing`; what two more blocks add is a block's. Left out: weights on their way to the disk
and zeros counted in them, what happens once a run, and what transformers does before the blocks.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import neuroal
from neuroal import Recipe
from neuroal.testing import simulated_device, tiny_model, tiny_tokenizer, windows

GRID = {"linear_schedule": {"lambdas": (0.05, 0.1)}, "neuroal": {"lambdas": (0.0, 0.1)}}
GENERATIONS = 2  # of block ratios and of row ratios
FINAL: dict[str, dict[str, Any]] = {
    **{p: {"pruner": p} for p in ("magnitude", "wanda", "ria", "sparsegpt", "admm", "alps")},
    "wanda, dsnot": {"refiner": "dsnot"},
    "wanda, sparseswaps": {"refiner": "sparseswaps"},
    "wanda, refit": {"reconstruction": "refit"},
    "wanda, block": {"reconstruction": "block", "options": {"block": {"passes": 1}}},
}
SEARCH: dict[str, dict[str, Any]] = {
    "wanda, neuroal": {"top_up": "neuroal", "options": GRID},
    "wanda, neuroal-fast": {"top_up": "neuroal-fast"},
    "sparsegpt, neuroal": {
        "pruner": "sparsegpt",
        "options": {"linear_schedule": GRID["linear_schedule"]},
    },
}
ELSEWHERE = (
    "safetensors.", "model.", "transformers.", "walk.block_arguments:", "run.apply:",
)  # fmt: skip


def waits(folder: Path, blocks: int, recipe: dict[str, Any]) -> int:
    """Return how often a run waits, but for what is left out."""
    given = {"sparsity": 0.5, "samples": 6, "search_samples": 2} | recipe
    asked = Recipe(calibration=str(folder / "w.jsonl"), device=simulated_device.NAME, **given)
    with tempfile.TemporaryDirectory() as out, simulated_device.traffic() as seen:
        neuroal.prune(folder / str(blocks), recipe=asked, out=Path(out) / "out")
    return sum(not e.place.startswith(ELSEWHERE) for e in seen.waits)


def main() -> None:
    """Print a table for the manual."""
    simulated_device.register()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for blocks in (2, 4):
            model: Any = tiny_model("llama", blocks=blocks)
            model.save_pretrained(folder / str(blocks))
            tiny_tokenizer().save_pretrained(folder / str(blocks))
        lines = (json.dumps({"input_ids": w.tolist()}) + "\n" for w in windows(6, 16))
        (folder / "w.jsonl").write_text("".join(lines))
        final = {}
        for name, recipe in FINAL.items():
            two, four = (waits(folder, n, {"top_up": "uniform"} | recipe) for n in (2, 4))
            final[name] = (four - two) / 2
            rows.append((name, "final pruning, a block", f"{final[name]:g}"))
        for name, recipe in SEARCH.items():
            two, four = (waits(folder, n, recipe) for n in (2, 4))
            own = (four - two) / 2 - final[str(recipe.get("pruner", "wanda"))]
            rows.append((name, "search, a block", f"{own:g}"))
    print(tabulate(rows, headers=("method", "where", "waits"), tablefmt="github"))


if __name__ == "__main__":
    main()
