"""What is measured of a finished run later: one entry a protocol, the card with it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import neuroal
from neuroal import Recipe, UsageError
from neuroal.evaluation import quality
from neuroal.evaluation.perplexity import Perplexity
from neuroal.model import files
from neuroal.run import later
from neuroal.testing import tiny_model

RTE = {"acc": 0.5, "metric": "acc", "examples": 9}
TASKS = {"tasks": {"rte": RTE}, "accuracy": 0.5, "harness": "lm-eval 0.4", "limit": None}
TASKS |= {"batch": 8, "dtype": "float32"}


def entry(perplexity: float, text: str = "ab", dtype: str = "float32") -> dict[str, Any]:
    found = Perplexity(perplexity, 3, 16, f"{text}.txt", text, dtype, "p")
    return quality.entry(found, Perplexity(10.0, 3, 16, f"{text}.txt", text, dtype, "p"))


@pytest.fixture
def run(recipe: Recipe, windows: Tensor, tmp_path: Path) -> Path:
    uniform = Recipe(sparsity=0.5, top_up="uniform", samples=recipe.samples, device="cpu")
    neuroal.prune(tiny_model("llama"), recipe=uniform, windows=windows, out=tmp_path / "out")
    return tmp_path / "out"


def test_an_entry_replaces_that_of_the_same_protocol(run: Path) -> None:
    before, sha256 = files.read_report(run), files.fingerprint(str(run))
    for new in (entry(20.0), entry(30.0, "cd"), entry(40.0), entry(50.0, dtype="bfloat16")):
        assert later.keep(run, new, None) == files.read_report(run)
    later.keep(run, None, TASKS)
    kept = later.keep(run, None, TASKS | {"accuracy": 0.75})
    assert kept == files.read_report(run)
    assert [x["perplexity"] for x in kept["evaluation"]] == [30.0, 40.0, 50.0]
    assert [x["accuracy"] for x in kept["zero_shot"]] == [0.75]
    assert files.fingerprint(str(run)) == sha256
    unchanged = {k: v for k, v in kept.items() if k not in ("evaluation", "zero_shot")}
    assert unchanged == {k: v for k, v in before.items() if k not in ("evaluation", "zero_shot")}
    assert sorted(p.suffix for p in run.iterdir() if p.suffix == ".tmp") == []


def test_the_card_has_what_is_kept(run: Path) -> None:
    later.keep(run, entry(20.0), TASKS)
    card = (run / "README.md").read_text()
    assert "| `ab.txt` | 3 of 16 tokens | 20.00 | 10.00 | +10.00 | 0.693 |\n" in card
    assert "- accuracy on rte: 0.5000 (lm-eval 0.4)\n" in card
    assert "collapsed" not in card
    later.keep(run, entry(200.0), None)
    card = (run / "README.md").read_text()
    assert "20.00 | 10.00" not in card and "| 200.00 | 10.00 | +190.00 | 2.996 |" in card
    assert "- the model has collapsed on 'ab.txt'" in card
    (run / "README.md").write_text(card + "My words.\n")
    later.keep(run, entry(30.0), None)
    assert (run / "README.md").read_text() == card + "My words.\n"
    (run / "README.md").unlink()
    later.keep(run, entry(30.0), None)
    assert not (run / "README.md").exists()


def test_a_card_that_was_written_before_its_report_is_ours(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two files: the same evaluation brings the folder in order."""

    class Killed(BaseException):
        pass

    def kill(path: Path, data: bytes) -> None:
        if path.name == files.MARKER:
            raise Killed
        files.write_atomically(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(later, "write_atomically", kill)
        with pytest.raises(Killed):
            later.keep(run, entry(20.0), None)
    assert files.read_report(run)["evaluation"] == []
    later.keep(run, entry(20.0), None)
    later.keep(run, entry(30.0), None)
    assert "| 30.00 |" in (run / "README.md").read_text()


def test_a_folder_that_cannot_be_written_to_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    before = (run / files.MARKER).read_bytes()
    monkeypatch.setattr(later, "write_atomically", refuse)
    with caplog.at_level(logging.WARNING, "neuroal"):
        assert later.keep(run, entry(20.0), None) is None
    assert f"the result is not kept in '{run}': Permission denied" in caplog.text
    assert (run / files.MARKER).read_bytes() == before


def test_reports_of_earlier_versions_have_room(run: Path) -> None:
    report = files.read_report(run)
    del report["evaluation"], report["zero_shot"]
    (run / files.MARKER).write_text(json.dumps(report))
    assert later.keep(run, entry(20.0), TASKS) == files.read_report(run)
    assert len(files.read_report(run)["evaluation"]) == 1


def test_only_a_run_has_a_place(run: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    assert later.run_folder_of(str(run)) == run
    assert later.run_folder_of("demo") is None
    model = save(tiny_model("llama"), tmp_path / "model")
    assert later.run_folder_of(str(model)) is None
    assert later.run_folder_of("owner/name") is None
    (model / files.MARKER).write_text('{"recipe": {}}')
    assert later.run_folder_of(str(model)) is None
    (model / files.MARKER).write_text("nothing")
    with pytest.raises(UsageError, match="cannot read"):
        later.run_folder_of(str(model))
