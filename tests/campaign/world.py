"""What attempts run on: tiny models, texts, recipes and studies."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroal.testing import tiny_model, tiny_tokenizer, windows
from tests.campaign.attempts import Ended, attempt

GRID = ["-o", "linear_schedule.lambdas=0.05", "-o", "neuroal.lambdas=0.1"]
TEXT = "".join(f"Sentence {i} of a small text, which says nothing. " for i in range(60))
STUDY = """models = ["{model}"]
pruners = ["magnitude", "wanda"]
top_ups = ["uniform"]
sparsities = [0.5]
device = "cpu"

[calibration]
source = "{text}"
samples = 2
length = 16

[[evaluations]]
data = "{text}"
windows = 2
length = 16
"""


@dataclass(frozen=True)
class World:
    """The folder of a campaign."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def tokens(self) -> Path:
        return self.root / "windows.jsonl"

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    @property
    def study(self) -> Path:
        return self.root / "study.toml"

    @property
    def finished(self) -> Path:
        return self.root / "finished"

    def prune(self, out: object, *more: object, seed: int = 0) -> list[object]:
        """The words of a run with every kind of step, as few of each as can be."""
        words = ["prune", self.model, "--sparsity", 0.6, "--calibration", self.tokens]
        words += ["--samples", 2, "--search-samples", 1, "--seed", seed, "--device", "cpu", "-q"]
        return [*words, "--top-up", "neuroal", *GRID, "--out", out, *more]


@dataclass(frozen=True)
class Setting:
    """A kind of run, its words, and how it goes on after it was interrupted."""

    name: str
    words: Callable[[Path], list[object]]
    resume: tuple[str, ...] = ("--resume",)


def settings(world: World) -> list[Setting]:
    """The settings in which runs are killed."""
    return [
        Setting("plain", lambda out: world.prune(out)),
        Setting("streamed", lambda out: world.prune(out, "--stream")),
        Setting("spilled", lambda out: world.prune(out, "--spill")),
        Setting("study", lambda out: ["study", "run", world.study, "--out", out, "--jobs", 1], ()),
        *later(world),
    ]


def later(world: World) -> list[Setting]:
    """What writes a folder from a finished run."""
    again = ("--overwrite",)  # these take seconds: there is nothing to go on with
    run, steps = world.finished, ["--data", world.text, "--steps", 2, "--length", 16, "--batch", 1]
    steps += ["--save-every", 1, "--lora", 1, "--device", "cpu", "-q"]
    return [
        Setting("pack", lambda out: ["pack", run, "--out", out, "-q"]),
        Setting("finetune", lambda out: ["finetune", run, *steps, "--out", out]),
        Setting("apply", lambda out: ["apply", world.model, run, "--out", out, "-q"], again),
        Setting(
            "export",
            lambda out: ["export", run, "--to", "eora", "-o", "eora.rank=1", "--out", out, "-q"],
            again,
        ),
    ]


def make(root: Path) -> World:
    """Make a world, and run everything once, so that children find what they import.

    But for a report: what draws its charts has threads, which a fork would lose.
    """
    world = World(root)
    model: Any = tiny_model("llama", blocks=2)
    model.save_pretrained(world.model)
    tiny_tokenizer().save_pretrained(world.model)
    rows = (json.dumps({"input_ids": w.tolist()}) + "\n" for w in windows(3, 16))
    world.tokens.write_text("".join(rows))
    world.text.write_text(TEXT)
    world.study.write_text(STUDY.format(model=world.model, text=world.text))
    in_this_process(world.prune(world.finished))
    in_this_process(["layout", world.model])
    in_this_process(["study", "run", world.study, "--out", root / "warm", "--jobs", 1])
    in_this_process(world.prune(root / "warm-streamed", "--stream"))
    for setting in later(world):
        in_this_process(setting.words(root / f"warm-{setting.name}"))
    return world


def in_this_process(words: list[object]) -> None:
    from neuroal.cli import main

    out = sys.stdout
    try:
        with open("/dev/null", "w") as sys.stdout:
            main([str(w) for w in words], prog_name="neuroal")
    except SystemExit as end:
        assert not end.code, words
    finally:
        sys.stdout = out


def identity(folder: Path) -> dict[str, str]:
    """What has to be the same in two results: the weights, and what reports say of them."""
    found = {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.rglob("*.safetensors")
    }
    for file in folder.rglob("neuroal.json"):
        report = json.loads(file.read_text())
        for key in ("candidates", "sparsity", "linears"):
            found[f"{file.relative_to(folder)} {key}"] = json.dumps(report[key], sort_keys=True)
    for file in (f for f in folder.rglob("*.json") if f.name != "neuroal.json"):
        text = file.read_text()
        for word in text.split('"perplexity": ')[1:]:
            found[f"{file.relative_to(folder)} perplexity"] = word.split(",")[0].strip()
    return found


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish(setting: Setting, out: Path, reference: dict[str, str]) -> tuple[Ended, str]:
    """Go on with a run; how that ended, and what is wrong."""
    there = out.exists()  # it was killed after its end
    ended = attempt([*setting.words(out), *setting.resume])
    done = there and "is finished" in ended.last
    if ended.wrong or (ended.status and not done):
        return ended, ended.wrong or f"cannot go on: {ended.last}"
    if identity(out) != reference:
        return ended, "another result with exit status 0"
    left = [p.name for p in out.parent.iterdir() if p.name.endswith((".partial", ".tmp"))]
    return ended, f"left {left}" if left else ""
