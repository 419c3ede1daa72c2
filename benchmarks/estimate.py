"""What `--dry-run` says beside what a run takes: the table of the estimate in docs/streaming.md.

    python benchmarks/estimate.py path/to/shared

Seconds are those that the process computes (of one thread), not those on the wall: so the numbers
mean the same on a machine that others use. `--wall` takes the wall's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

CASES: dict[str, dict[str, Any]] = {
    "wanda, neuroal": {},
    "wanda, uniform": {"top_up": "uniform"},
    "wanda, owl": {"top_up": "owl"},
    "wanda, dsnot": {"top_up": "uniform", "refiner": "dsnot"},
    "wanda, neuroal, output_kl": {"alignment": "output_kl"},
    "wanda, neuroal, batch 1": {"batch": 1},
    "wanda, neuroal, batch 32": {"batch": 32},
    "wanda, neuroal, bfloat16": {"search_dtype": "bfloat16"},
    "magnitude, neuroal": {"pruner": "magnitude"},
    "sparsegpt, neuroal-block": {"pruner": "sparsegpt", "top_up": "neuroal-block"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path, help="folder with models/ and reference/")
    parser.add_argument("--models", nargs="+", default=["llama", "mistral", "phi", "opt"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--wall", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.wall:
        time.perf_counter = time.process_time
    from neuroal import Recipe, engine
    from neuroal.cost.plan import plan
    from neuroal.cost.preparation import prepare

    windows = given.shared / "reference/llama.calibration.jsonl"
    print("| model | run | seconds, estimated | taken | ratio | GiB, estimated | taken | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name in given.models:
        for case in given.cases:
            recipe = Recipe(
                **{"model": str(given.shared / "models" / name), "calibration": str(windows)},
                **{"sparsity": 0.6, "samples": 32, "length": 256, "device": "cpu"},
                **CASES[case],
            )
            made = plan(prepare(recipe), timed=True)
            with tempfile.TemporaryDirectory() as folder:
                report = engine.prune(recipe.model, recipe=recipe, out=Path(folder) / "out")
            assert made.seconds is not None and made.block_runs == report.counts["block_runs"]
            phases = ("measure", "block_search", "row_search", "prune")
            taken = sum(report.timings.get(phase, 0.0) for phase in phases)
            said, memory = sum(made.seconds.values()), made.needs.memory(made.offload)
            print(
                f"| {name} | {case} | {said:.2f} | {taken:.2f} | {taken / said:.2f} "
                f"| {memory / 2**30:.2f} | {report.peak_memory_bytes / 2**30:.2f} "
                f"| {report.peak_memory_bytes / memory:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
