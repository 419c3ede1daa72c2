"""Bytes, CPU seconds and memory of packed checkpoints: the numbers of docs/howto/pack.md.

    python benchmarks/packed.py RUN ... --folder FOLDER

packs every run, plain and compressed, in processes of their own; unpacks it and compares the
SHA-256 of every file of weights; loads the dense and the packed folder by transformers'
`from_pretrained` and compares every tensor, and the logits of 64 tokens, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# What a process does, between its start and the numbers that it prints. Linux forgets the peak of
# its memory where a 5 is written, so that what imports took does not count.
MEASURE = """
import json, time
from pathlib import Path
{before}
def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(name)).split()[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")
start, empty = time.process_time(), memory("VmRSS")
{code}
seconds = time.process_time() - start
print(json.dumps({{"seconds": seconds, "more": memory("VmHWM") - empty}}))
"""
PACK = (
    "import neuroal.model.pretrained, pyarrow; from neuroal.run.pack import pack",
    "pack({source!r}, {target!r}, compress={compress})",
)
UNPACK = ("from neuroal.run.pack import unpack", "unpack({target!r}, {again!r})")
LOAD = (
    "import neuroal, torch, pyarrow; from transformers import AutoModelForCausalLM as Auto, "
    "LlamaForCausalLM",
    "Auto.from_pretrained({target!r})(torch.arange(64)[None])",  # weights may be mapped till then
)


def measured(before: str, code: str, **names: Any) -> dict[str, float]:
    """Return seconds and memory of some code in a process of its own."""
    text = MEASURE.format(before=before, code=code.format(**names))
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def same_files(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same files of weights, by their SHA-256."""

    def digests(folder: Path) -> dict[str, str]:
        files = sorted(folder.glob("*.safetensors"))
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    return digests(one) == digests(other)


def same_model(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same model: every tensor, and logits, to the bit."""
    import torch
    from transformers import AutoModelForCausalLM

    import neuroal  # noqa: F401  # has transformers read packed folders

    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(x) for x in (one, other))
        ids = torch.arange(64)[None]
        equal = torch.equal(a(ids).logits, b(ids).logits)
        pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        return equal and all(torch.equal(x, y) for x, y in pairs)


def row(run: Path, compress: bool, folder: Path) -> dict[str, Any]:
    """Pack a run, unpack it, load it, and return what was measured."""
    from neuroal.model.packing import packing_of

    target, again = folder / f"{run.name}-packed", folder / f"{run.name}-again"
    for path in (target, again):
        shutil.rmtree(path, ignore_errors=True)
    names = {"source": str(run), "target": str(target), "again": str(again)}
    times = {"pack": measured(*PACK, **names, compress=compress)}
    times["unpack"] = measured(*UNPACK, **names)
    times["load"] = measured(*LOAD, **names)
    times["load dense"] = measured(*LOAD, **names | {"target": str(run)})
    found = packing_of(target)
    return {
        "run": run.name,
        "compress": compress,
        "dense": found.dense,
        "packed": found.bytes,
        "share": found.bytes / found.dense,
        "share of the packed matrices": found.share(),
        "same files": same_files(run, again),
        "same model": same_model(run, target),
        "measured": times,
    }


def main() -> None:
    """Print a line for every run and form, and a JSON object at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for run in asked.runs:
        for compress in (False, True):
            rows.append(found := row(run, compress, asked.folder))
            times = found["measured"]
            print(
                f"| {run.name} | {'zstd' if compress else 'plain'} | {found['packed']:,} "
                f"| {found['share']:.4f} | {found['share of the packed matrices']:.4f} "
                f"| {times['pack']['seconds']:.1f} s, {times['pack']['more'] / 2**20:.0f} MiB "
                f"| {times['unpack']['seconds']:.1f} s "
                f"| {times['load']['seconds']:.1f} s, {times['load']['more'] / 2**20:.0f} MiB "
                f"| {times['load dense']['seconds']:.1f} s, "
                f"{times['load dense']['more'] / 2**20:.0f} MiB "
                f"| {'same files' if found['same files'] else 'OTHER FILES'}, "
                f"{'same model' if found['same model'] else 'ANOTHER MODEL'} |",
                flush=True,
            )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
