"""`neuroal study`: from a file to a table, and what is said of mistakes."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file

from neuroal.cli import main
from neuroal.study.cluster import on_ray

Run = Callable[..., Result]
STUDY = """
models = ["tiny"]
pruners = ["magnitude"]
top_ups = ["uniform", "neuroal-block"]
sparsities = [0.5]
seeds = [0, 1]

[calibration]
source = "text.txt"
samples = 2
search_samples = 1
length = 16

[[evaluations]]
data = "rows.jsonl"
label = "rows"
"""


@pytest.fixture
def desk(folder: Path) -> Path:
    (folder / "mine.toml").write_text(STUDY)
    return folder


def test_from_plan_to_table(desk: Path, run: Run) -> None:
    planned = run("study", "plan", "mine.toml", "--jobs", 2)
    assert planned.exit_code == 0, planned.stderr
    words = " ".join(planned.output.split())
    assert "cases 5 (1 dense)" in words and "left 5" in words and "time about" in words
    done = run("study", "run", "mine.toml")
    assert done.exit_code == 0, done.stderr
    assert "finished now 5" in " ".join(done.output.split())
    assert len(list((desk / "mine-results/cases").iterdir())) == 5
    again = json.loads(run("study", "run", "mine.toml", "--json").stdout)
    assert (again["cases"], again["earlier"], again["run"], again["failed"]) == (5, 5, 0, [])
    shown = run("study", "table", "mine-results").output
    assert "**rows (perplexity)**" in shown and " ± " in shown
    text = run("study", "table", "mine-results", "--format", "csv").output
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["top_up"] for row in rows] == ["", "uniform", "neuroal-block"]
    assert [row["seeds"] for row in rows] == ["1", "2", "2"]
    as_json = json.loads(run("study", "table", "mine-results", "--json").stdout)["cells"]
    assert [cell["mean"] for cell in as_json] == [float(row["mean"]) for row in rows]


def test_plan_says_what_is_skipped_and_why(desk: Path, run: Run) -> None:
    text = STUDY.replace('"magnitude"', '"wanda", "sparsegpt"').replace("-block", "-row")
    (desk / "mine.toml").write_text(text)
    shown = run("study", "plan", "mine.toml", "--no-time").output
    assert "2  top-up 'neuroal-row' is a row step alone" in shown
    planned = json.loads(run("study", "plan", "mine.toml", "--no-time", "--json").stdout)
    assert planned["estimate"] is None
    assert len(planned["cases"]) == 7 and len(planned["skipped"]) == 2
    assert planned["skipped"][0]["labels"]["pruner"] == "sparsegpt"
    assert not (desk / "mine-results").exists()  # a plan leaves nothing


def test_a_failed_case_is_an_exit_code_and_a_line(desk: Path, run: Run) -> None:
    weights = load_file(desk / "tiny/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, desk / "tiny/model.safetensors")
    done = run("study", "run", "mine.toml")
    assert done.exit_code == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: 5 of 5 cases failed, the first: tiny, dense: model 'tiny' lacks")
    assert "mine-results/cases/" in line
    assert done.stdout.count("lacks the weight") == 5
    assert run("study", "table", "mine-results").stderr == (
        "Error: no case of 'mine-results' is finished yet\n"
    )


def test_init_writes_a_study_that_can_be_planned(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("study", "init").exit_code == 0
    planned = json.loads(run("study", "plan", "study.toml", "--no-time", "--json").stdout)
    assert len(planned["cases"]) == 1 + 2 * 3 * 2
    assert run("study", "init", "paper.toml", "--paper").exit_code == 0
    assert 'top_ups = ["uniform", "dsnot",' in (folder / "paper.toml").read_text()
    for arguments, message in (
        (["study.toml"], "Error: 'study.toml' exists: give another name\n"),
        (["no/x.toml"], "Error: there is no folder 'no' to write 'x.toml' in\n"),
    ):
        refused = run("study", "init", *arguments)
        assert (refused.exit_code, refused.stderr) == (2, message)


@pytest.mark.parametrize("flags", [[], ["--paper"]])
def test_the_commands_that_a_study_names_work(folder: Path, run: Run, flags: list[str]) -> None:
    said = run("study", "init", "my study.toml", *flags).stdout
    text = (folder / "my study.toml").read_text()
    named = re.findall(r"`(neuroal [^`]*)`", text + said)
    named += re.findall(r"^# +(neuroal .*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(named) >= 3
    for line in named:
        words = shlex.split(line)[1:]
        group: Any = main.commands[words[0]]
        context = group.commands[words[1]].make_context(
            " ".join(words[:2]), words[2:]
        )  # raises where it is wrong
        if words[0] == "plugins":
            assert run(*words).exit_code == 0, line
        else:
            assert context.params["file"] == "my study.toml"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sparsities", "sparsity", "study 'mine.toml': unknown key 'sparsity': did you mean"),
        ('"magnitude"', '"magnitud"', "unknown pruner 'magnitud': did you mean 'magnitude'?"),
        ('"tiny"', '"."', "models[1]"),
        ("text.txt", "txt.txt", "no such file: source 'txt.txt' does not exist"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_mistakes_are_named_before_anything_runs(
    command: str, old: str, new: str, message: str, desk: Path, run: Run
) -> None:
    (desk / "mine.toml").write_text(STUDY.replace(old, new))
    refused = run("study", command, "mine.toml")
    assert refused.exit_code in (1, 2)
    assert refused.stderr.startswith("Error: study 'mine.toml': ")
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (desk / "mine-results").exists()


def test_what_is_no_study(desk: Path, run: Run) -> None:
    for arguments, message in (
        (["run", "none.toml"], "cannot read study 'none.toml': No such file or directory"),
        (["table", "tiny"], "'tiny' is no results folder of a study: it holds no study.json"),
        (["run", "mine.toml", "--out", "tiny"], "'tiny' exists and holds no study"),
    ):
        refused = run("study", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
    run("study", "run", "mine.toml", "-q")
    refused = run("study", "table", "mine-results", "--metric", "rowz")
    assert "has no evaluation 'rowz': did you mean 'rows'?" in refused.stderr
    shutil.rmtree("mine-results/cases")
    assert run("study", "table", "mine-results").exit_code == 1


def test_without_ray(monkeypatch: pytest.MonkeyPatch, desk: Path, run: Run) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return real(name, *arguments, **more)

    assert on_ray is not None
    monkeypatch.setattr(builtins, "__import__", without)
    refused = run("study", "run", "mine.toml", "--executor", "ray")
    assert refused.exit_code == 2
    assert refused.stderr == "Error: --executor ray needs Ray: pip install 'neuroal[ray]'\n"
