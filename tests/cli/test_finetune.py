"""`neuroal finetune`: what it says, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the extra neuroal[finetune]")
TEXT = ("--data", "rows.jsonl", "--batch", 2, "--device", "cpu")


@pytest.fixture
def pruned(folder: Path, prune: Any) -> Path:
    assert prune("--pruner", "magnitude", "--top-up", "uniform", "--out", "run").exit_code == 0
    return folder


def test_from_a_run_to_another_and_its_numbers(pruned: Path, run: Any) -> None:
    done = run("finetune", "run", *TEXT, "--steps", 3, "--lora", 2, "--out", "tuned")
    assert done.exit_code == 0, done.stderr
    assert "this will take about" in done.stderr and "of memory" in done.stderr
    assert "fine-tuned from    run" in done.stdout and "at step 1 to" in done.stdout
    assert not (pruned / "tuned.partial").exists()
    again = ("finetune", "run", *TEXT, "--steps", 3, "--lora", 2, "--out", "tuned")
    refused = run(*again)
    assert refused.exit_code == 2 and "output folder 'tuned' exists" in refused.stderr
    assert "nothing to resume: 'tuned' is finished" in run(*again, "--resume").stderr
    shown = run(*again, "--overwrite", "--json", "-q")
    assert json.loads(shown.stdout)["parent"]["name"] == "run" and shown.stderr == ""


def test_a_perplexity_has_that_of_the_parent_beside_it(pruned: Path, run: Any) -> None:
    text = ("--data", "text.txt", "--length", 16, "--device", "cpu")
    assert run("evaluate", "run", *text).exit_code == 0
    assert run("finetune", "run", *TEXT, "--steps", 3, "--out", "tuned").exit_code == 0
    assert run("evaluate", "tuned", *text).exit_code == 0
    said = json.loads(Path("tuned/neuroal.json").read_text())
    assert said["evaluation"][0]["sha256"] == said["parent"]["evaluation"][0]["sha256"]
    pytest.importorskip("jinja2", reason="the extra neuroal[report]")
    assert run("report", "tuned", "--out", "page.html").exit_code == 0
    assert "before the training" in Path("page.html").read_text()


def test_a_dry_run_writes_nothing(pruned: Path, run: Any) -> None:
    before = sorted(pruned.iterdir())
    done = run("finetune", "run", *TEXT, "--steps", 3, "--out", "tuned", "--dry-run")
    assert done.exit_code == 0 and "this will take about" in done.stderr and done.stdout == ""
    assert sorted(pruned.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--full", "--lora", 2), "--full and --lora exclude each other"),
        (("--save-every", 0), "--save-every 0 is too low"),
        (("--target", "mlp"), "give a rank (--lora)"),
        (("--data", "absent.jsonl"), "no such file"),
        (("--device", "cuda:1"), "choose one by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_is_refused(pruned: Path, run: Any, given: Any, message: str) -> None:
    before = sorted(pruned.iterdir())
    refused = run("finetune", "run", *TEXT, "--steps", 3, "--out", "tuned", *given)
    assert refused.exit_code == 2 and message in refused.stderr
    assert sorted(pruned.iterdir()) == before
