"""Make the table of supported models.

    python -m tests.architectures [--shard 1/4] [--only gpt2 ...] [--cases build/coverage.jsonl]
        [--out docs/models.md]

Every architecture is one line of the cases file; one that is there already, of the same releases
of transformers and neuroal's source, is not run again, so that the command can be stopped and
repeated. With --only or --shard no page is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
import transformers
from tqdm import tqdm

import neuroal

from .check import Outcome, check
from .page import page
from .tiny import architectures, shard


def source_sha256() -> str:
    """Return the SHA-256 over what an outcome depends on: neuroal, its plugins and this folder."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256(transformers.__version__.encode())
    for folder in ("neuroal", "plugins", "tests/architectures"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@click.command(help=__doc__)
@click.option("--cases", type=click.Path(path_type=Path), default=Path("build/coverage.jsonl"))
@click.option("--shard", "part", default="1/1", help="Which of how many parts.")
@click.option("--only", multiple=True, help="A model type; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/models.md"))
def main(cases: Path, part: str, only: tuple[str, ...], out: Path) -> None:
    """Run what is missing and write the page."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger(neuroal.__name__).setLevel(logging.ERROR)
    source = source_sha256()
    cases.parent.mkdir(parents=True, exist_ok=True)
    lines = cases.read_text("utf-8").splitlines() if cases.exists() else []
    done = {x["model_type"]: x for x in map(json.loads, lines) if x.pop("source") == source}
    names = only or shard(list(architectures()), part)
    with cases.open("a", encoding="utf-8") as file:
        for name in tqdm([n for n in names if n not in done or only]):
            result: dict[str, Any] = check(name).to_json()
            done[name] = result
            print(json.dumps({**result, "source": source}), file=file, flush=True)
            if result["verdict"] != "supported":
                tqdm.write(f"{name}: {result['kind']} {result['verdict']}: {result['reason']}")
    if all(name in done for name in architectures()):
        out.write_text(page([Outcome(**done[n]) for n in sorted(architectures())]), "utf-8")
        click.echo(f"wrote {out}")


main()
