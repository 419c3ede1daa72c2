"""A run under a hard limit of memory, smaller than it takes: the numbers of docs/streaming.md.

    python benchmarks/streaming.py --folder FOLDER
    python benchmarks/streaming.py --folder FOLDER --shape wide --limit 2.1 --samples 2
    python benchmarks/streaming.py --folder FOLDER --shape long --samples 128 --length 2048

makes a random Llama-structure model (of 1.1 billion weights, 4.4 GB in float32; one that is nearly
all vocabulary; or a small one, whose activations are larger than it), prunes it in memory without a
limit, and in processes that may map so many GiB and no more (RLIMIT_AS), as neuroal chooses and
with blocks and activations on the disk; shows that the same run in memory is refused there, and
compares every tensor. Beside the peak of a streamed run stands its bound: two blocks, activations
and 1 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    "long": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4},
    "wide": {
        **{"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4},
        **{"vocab_size": 256000},
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4},
}
VOCABULARY = 32000
OPTIONS = {"linear_schedule": {"lambdas": [0.05, 0.15]}, "neuroal": {"lambdas": [0.1, 0.25]}}


def make_model(folder: Path, shape: dict[str, int]) -> None:
    """Write a random model, one file a block or other tensor, never holding more than one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": VOCABULARY} | shape,
        num_attention_heads=shape["hidden_size"] // 64,
        num_key_value_heads=max(1, shape["hidden_size"] // 512),
        max_position_embeddings=2048,
        dtype="float32",
    )
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    files: dict[str, dict[str, torch.Size]] = {}
    for name, size in shapes.items():
        part = name.split(".")[2] if ".layers." in name else name
        files.setdefault(f"model-{part}.safetensors", {})[name] = size
    rng = torch.Generator().manual_seed(0)
    for file, names in files.items():
        tensors = {
            name: torch.ones(size) if "norm" in name else _random(size, rng)
            for name, size in names.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    where = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": 4 * sum(s.numel() for s in shapes.values())}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": where}))


def _random(size: torch.Size, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=rng) / size[1] ** 0.5


def make_windows(file: Path, vocabulary: int, samples: int, length: int) -> None:
    """Write random token windows."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (samples, length), generator=rng).tolist()
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))


def child(given: dict[str, Any]) -> None:
    """Prune under a limit, and print what it took."""
    import resource

    from neuroal import NeuroalError, Recipe, engine

    if given["limit"]:
        resource.setrlimit(resource.RLIMIT_AS, (given["limit"], given["limit"]))
    recipe, start = Recipe.from_json(given["recipe"]), time.perf_counter()
    try:
        report = engine.prune(
            given["model"], recipe=recipe, out=given["out"], overwrite=True,
            stream=given["stream"], spill=given["spill"],
        )  # fmt: skip
        said: dict[str, Any] = {"notes": report.notes, "timings": report.timings}
    except NeuroalError as error:
        said = {"error": str(error)}
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    said |= {
        "seconds": time.perf_counter() - start,
        "resident": int(status["VmHWM"].split()[0]) * 1024,
        "mapped": int(status["VmPeak"].split()[0]) * 1024,
    }
    print(json.dumps(said))


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def bound(recipe: dict[str, Any], model: Path, spill: bool) -> float:
    """Return what a streamed run may take: two blocks, activations (of one batch) and 1 GB."""
    from neuroal import Recipe
    from neuroal.cost.plan import plan
    from neuroal.cost.preparation import prepare

    needs = plan(prepare(Recipe.from_json(recipe | {"model": str(model)}))).needs
    block = (model / "model-0.safetensors").stat().st_size
    return 2 * block + (needs.batch if spill else needs.activations) + 1e9


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield every tensor of a checkpoint with its file, open."""
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors to the bit."""
    files = {}
    for file in b.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    seen = set()
    for name, tensor in tensors(a):
        with safe_open(files[name], framework="pt") as opened:
            if not tensor.equal(opened.get_tensor(name)):
                return False
        seen.add(name)
    return seen == files.keys()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where models and outputs go (20 GB)")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--limit", type=float, default=2.5, help="GiB that a process may map")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--pruner", default="wanda")
    parser.add_argument("--top-up", default="neuroal")
    parser.add_argument("--alignment", default="neuron")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    folder: Path = given.folder
    model, windows = folder / given.shape, folder / "windows.jsonl"
    if not model.exists():
        make_model(model, SHAPES[given.shape])
    vocabulary = SHAPES[given.shape].get("vocab_size", VOCABULARY)
    make_windows(windows, vocabulary, given.samples, given.length)
    recipe = {
        **{"sparsity": 0.7, "pruner": given.pruner, "top_up": given.top_up, "device": "cpu"},
        **{"alignment": given.alignment},
        **{"options": OPTIONS if given.top_up == "neuroal" else {}},
        **{"calibration": str(windows), "samples": given.samples, "search_samples": 2},
    }
    limit = int(given.limit * 2**30)
    runs: dict[str, tuple[bool | None, int]] = {  # what is on the disk, and the limit
        "in memory, limited": (False, limit),
        "as chosen, limited": (None, limit),
        "both on the disk, limited": (True, limit),
        "in memory, no limit": (False, 0),
    }
    sizes = {f.stem: f.stat().st_size for f in model.glob("*.safetensors")}
    size, around = sum(sizes.values()), sum(n for f, n in sizes.items() if ".weight" in f)
    print(f"weights {gib(size)}, {gib(around)} around the blocks; limit {gib(limit)} (RLIMIT_AS)")
    print("| run | seconds | peak resident | bound | peak mapped | |\n|---|---|---|---|---|---|")
    outs = {name: folder / name.replace(", ", "-").replace(" ", "-") for name in runs}
    for name, (on_disk, allowed) in runs.items():
        how = {"stream": on_disk, "spill": on_disk, "limit": allowed, "out": str(outs[name])}
        asked = json.dumps({"model": str(model), "recipe": recipe} | how)
        command = [sys.executable, __file__, "--child", asked]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        said = json.loads(done.stdout.splitlines()[-1])
        what = said.get("error") or "; ".join(said["notes"])
        streams = on_disk or (on_disk is None and "blocks" in what)
        most = (
            gib(bound(recipe | {"length": given.length}, model, bool(on_disk))) if streams else ""
        )
        peaks = f"{gib(said['resident'])} | {most} | {gib(said['mapped'])}"
        if "error" in said:
            del outs[name]
        print(f"| {name} | {said['seconds']:.1f} | {peaks} | {what} |", flush=True)
    whole = outs.pop("in memory, no limit")
    for name, out in outs.items():
        print(f"{name}: same bits: {same(whole, out)}")


if __name__ == "__main__":
    main()
