"""The example packages of the docs pass their own tests and run from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from neuroal.testing import tiny_model, tiny_tokenizer, windows

FromSource = Callable[..., dict[str, str]]
Run = Callable[..., subprocess.CompletedProcess[str]]
NAMES = ("neuroal-nowag", "neuroal-halving")


@pytest.fixture
def examples(project: Path) -> Path:
    return project / "docs" / "examples"


def test_every_example_is_tested(examples: Path) -> None:
    assert {path.parent.name for path in examples.glob("*/pyproject.toml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_own_tests_pass(
    name: str, examples: Path, from_source: FromSource, run_process: Run
) -> None:
    folder = examples / name
    environment = from_source(folder) | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = run_process(command, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout


def test_run_from_the_command_line(
    examples: Path, tmp_path: Path, from_source: FromSource, run_process: Run
) -> None:
    environment = from_source(*(examples / name for name in NAMES))
    tiny_model("llama", blocks=2).save_pretrained(tmp_path / "tiny")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    rows = [json.dumps({"input_ids": row}) for row in windows(4, 16).tolist()]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")

    def neuroal(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "neuroal", *arguments]
        return run_process(command, env=environment, cwd=tmp_path)

    names = ("nowag", "successive_halving", "correlation_distance", "halving")
    done = neuroal("plugins", "check", *names)
    assert done.returncode == 0, done.stdout + done.stderr

    given = ("--calibration", "rows.jsonl", "--samples", 4, "--search-samples", 4, "--json", "-q")
    done = neuroal(
        *("prune", "tiny", "--pruner", "nowag", "--top-up", "halving"),
        *("-o", "successive_halving.candidates=4", "--out", "out", *given),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {x["name"] for x in report["plugins"]} > set(names[:3])
    assert all(len(x["sha256"]) == 64 for x in report["plugins"])
    searched = [x["windows"] for x in report["candidates"] if x["plugin"] == "successive_halving"]
    assert searched == [1, 1, 1, 1, 2, 2, 4]  # four windows are all that there are
    assert report["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3)
