"""A tiny Llama with a tokenizer on disk, calibration files, and the command run in-process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from neuroal.cli import main
from neuroal.testing import tiny_model, tiny_tokenizer, windows

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two blocks and its tokenizer of 97 characters."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama", blocks=2).save_pretrained(path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the model, rows of token ids, and a text."""
    shutil.copytree(tiny, tmp_path / "tiny")
    rows = [json.dumps({"input_ids": row}) for row in windows(8, 16).tolist()]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run() -> Run:
    """Runs `neuroal` in this process: `run("prune", "tiny", …)`."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="neuroal")

    return invoke


@pytest.fixture
def prune(run: Run) -> Run:
    """Runs `neuroal prune tiny` on four rows of token ids."""

    def invoke(*arguments: object) -> Result:
        given = ("--calibration", "rows.jsonl", "--samples", 4, "--search-samples", 2)
        return run("prune", "tiny", *given, *arguments)

    return invoke


@pytest.fixture
def process(
    tmp_path: Path, run_process: Callable[..., subprocess.CompletedProcess[str]]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m neuroal` in a process of its own."""

    def start(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
        command = ["-m", "neuroal"] if code is None else ["-c", code]
        return run_process([sys.executable, *command, *arguments], cwd=tmp_path)

    return start
