"""What cannot be reported is refused in one line, before anything is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from neuroal.cli import main


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `neuroal report` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: object) -> Result:
        given = ["report", *(str(a) for a in arguments)]
        return CliRunner().invoke(main, given, prog_name="neuroal")

    return invoke


def refused(result: Result, status: int, *words: str) -> None:
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert all(word in line for word in words), line


def test_a_run(report: Callable[..., Result], run: Path) -> None:
    result = report(run, "--out", "one.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("written to one.html (0.1 MiB)") and result.stderr == ""
    assert Path("one.html").read_text().startswith("<!DOCTYPE html>")
    assert report(run, "-q").output == "" and Path("report.html").is_file()
    assert sorted(p.name for p in Path().iterdir()) == ["one.html", "report.html"]


def test_progress(
    report: Callable[..., Result], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuroal.progress.SECONDS", 0.0)
    assert "report: 1 of " in report(run, "--progress").stderr


def test_nothing_given(report: Callable[..., Result]) -> None:
    refused(report(), 2, "nothing to report", "folders of runs or studies")


def test_an_earlier_file_stays(report: Callable[..., Result], run: Path) -> None:
    Path("report.html").write_text("mine")
    refused(report(run), 2, "'report.html' exists", "--overwrite")
    assert Path("report.html").read_text() == "mine"
    assert report(run, "--overwrite").exit_code == 0
    assert Path("report.html").read_text() != "mine"


def test_a_place_that_cannot_be_written(report: Callable[..., Result], run: Path) -> None:
    refused(report(run, "--out", "nowhere/report.html"), 2, "nowhere", "does not exist")
    Path("folder").mkdir()
    refused(report(run, "--out", "folder"), 2, "'folder' is a folder", "--out report.html")


def test_what_is_no_run(report: Callable[..., Result], run: Path, report_of: Any) -> None:
    refused(report("missing", "--out", "nowhere/x.html"), 2, "'missing' does not exist")
    refused(report(f"{run}s"), 2, f"'{run}s' does not exist: did you mean '{run}'?")
    Path("empty").mkdir()
    refused(
        report("empty"), 2, "'empty' is neither a run (no neuroal.json) nor a study (no study.json)"
    )
    Path("broken.json").write_text("{")
    refused(report("broken.json"), 2, "cannot read", "broken.json")
    Path("recipe.json").write_text(json.dumps(report_of(run)["recipe"]))
    refused(report("recipe.json"), 2, "'recipe.json' is no report of a run", "it has no 'schema'")
    Path("other.json").write_text(json.dumps(report_of(run) | {"schema": 99}))
    refused(report("other.json"), 2, "schema 99, this neuroal reads 1")
    assert report(run, "missing").exit_code == 2  # one bad path, and nothing is written
    assert not list(Path().glob("*.html"))


@pytest.mark.parametrize("missing", ["vl_convert", "jinja2"])
def test_without_the_extra(
    missing: str, report: Callable[..., Result], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    refused(report(run), 1, f"a report needs {missing}", "pip install 'neuroal[report]'")
    assert not Path("report.html").exists()
