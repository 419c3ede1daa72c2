"""Two tiny models on disk, rows of token ids, and a study of them that takes seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuroal.study.results import CaseResult
from neuroal.study.run import Execution, PreparedStudy, prepare, run
from neuroal.testing import tiny_model, tiny_tokenizer, windows

STUDY = """
models = ["llama", "opt"]
pruners = ["magnitude", "wanda"]
top_ups = ["uniform", "owl"]
sparsities = [0.5, 0.7]
dtype = "float32"

[calibration]
source = "rows.jsonl"
samples = 4
search_samples = 2

[[evaluations]]
data = "rows.jsonl"
label = "rows"

[[evaluations]]
data = "text.txt"
length = 16
windows = 3
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    for structure in ("llama", "opt"):
        tiny_model(structure, blocks=2).save_pretrained(root / structure)  # type: ignore[operator]
        tiny_tokenizer().save_pretrained(root / structure)
    return root


@pytest.fixture
def desk(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `study.toml` and everything that it names."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    rows = [json.dumps({"input_ids": row}) for row in windows(8, 16).tolist()]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps. " * 20)
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


Change = Callable[..., PreparedStudy]


@pytest.fixture
def prepared(desk: Path) -> Change:
    """Prepares the study after replacing texts in its file: `prepared(("0.7", "0.6"))`."""

    def make(*changes: tuple[str, str]) -> PreparedStudy:
        text = (desk / "study.toml").read_text()
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        (desk / "study.toml").write_text(text)
        return prepare(Path("study.toml"), Path("out"), allow_plugin_files=True)

    return make


@pytest.fixture
def finish() -> Callable[..., list[CaseResult]]:
    """Runs what is left of a study: `finish(prepared, jobs=2)`."""

    def runner(what: PreparedStudy, **how: Any) -> list[CaseResult]:
        return list(run(what, Execution(**how)))

    return runner
