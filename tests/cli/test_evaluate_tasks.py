"""`neuroal evaluate --tasks`: one call for text and tasks, on a model's folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"ctx": f"The {who} went", "endings": ["home.", "red.", "of.", "two."], "label": n % 4}
    for n, who in enumerate(("miller", "sailor", "weaver", "mason", "cook"))
]
DEFINITION = """\
task: goings
dataset_path: json
dataset_kwargs:
  data_files:
    test: mine/goings.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: "{{endings}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def mine(folder: Path) -> Path:
    """The folder `mine` with the definition of a task."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: neuroal[eval]")
    path = folder / "mine"
    path.mkdir()
    (path / "goings.yaml").write_text(DEFINITION)
    (path / "goings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.usefixtures("mine")
def test_tasks_and_text_in_one_call(run: Any) -> None:
    given = ("--tasks", "goings", "--include-path", "mine")
    text = ("--data", "text.txt", "--length", 32)
    both = run("evaluate", "tiny", *given, *text, "--json")
    assert both.exit_code == 0 and both.stderr == ""
    said = json.loads(both.stdout)
    alone = json.loads(run("evaluate", "tiny", *text, "--json").stdout)
    assert {k: said[k] for k in alone if k != "seconds"} == {
        k: v for k, v in alone.items() if k != "seconds"
    }
    score = said["zero_shot"]["tasks"]["goings"]
    assert score["examples"] == 5 and said["zero_shot"]["accuracy"] == score["acc"]
    only = json.loads(run("evaluate", "tiny", *given, "--json").stdout)
    assert only.keys() == {"model", "zero_shot", "seconds"}
    assert only["zero_shot"] == said["zero_shot"]
    table = run("evaluate", "tiny", *given, "--limit", 2, "--batch-size", 1).stdout
    assert "1 requests a batch, limited to 2 a task" in table
    assert any(x.split()[:2] == ["goings", "acc_norm"] for x in table.splitlines())
    quiet = run("evaluate", "tiny", *given, *text, "-q").stdout.splitlines()
    assert quiet == [
        f"{said['perplexity']:.4f}",
        f"goings acc {score['acc']:.4f}",
        f"goings acc_norm {score['acc_norm']:.4f}",
    ]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("options", "says", "code"),
    [
        (("--tasks", "goinsg", "--include-path", "mine"), "did you mean 'goings'?", 2),
        (("--tasks", "goings", "--include-path", "yours"), "'yours' does not exist", 2),
        (("--tasks", "goings", "--include-path", "mine", "--limit", 0), "limit 0 is not", 2),
        (("--tasks", "goings", "--include-path", "mine", "--batch-size", 0), "batch 0 is not", 2),
        (("--tasks", "rte"), "cannot load task 'rte': ", 1),
        (("--tasks", " "), "no task is named", 2),
    ],
)
def test_bad_tasks_end_in_one_line(
    options: tuple[str, ...], says: str, code: int, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    from neuroal.model import pretrained

    monkeypatch.setattr(pretrained, "load", lambda *_: pytest.fail("the model was loaded"))
    result = run("evaluate", "tiny", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "needs --data or --tasks"),
        (("--data", "text.txt", "--limit", 3), "--limit is for --tasks, which is not given"),
        (("--data", "text.txt", "--include-path", "."), "--include-path is for --tasks"),
        (("--tasks", "rte", "--windows", 3), "--windows is for --data, which is not given"),
        (("--tasks", "rte", "--length", 32), "--length is for --data"),
    ],
)
def test_options_without_what_they_are_for(
    options: tuple[str, ...], says: str, folder: Path, run: Any
) -> None:
    result = run("evaluate", "tiny", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


def test_without_the_extra_the_cure_is_named(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *x: None if name == "lm_eval" else find_spec(name, *x),
    )
    result = run("evaluate", "tiny", "--tasks", "paper")
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: zero-shot tasks need lm-eval, which is not installed: pip install 'neuroal[eval]'\n"
    )


@pytest.mark.usefixtures("mine")
def test_a_model_without_a_tokenizer_is_refused_before_it_is_loaded(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    from neuroal.model import pretrained

    monkeypatch.setattr(pretrained, "load", lambda *_: pytest.fail("the model was loaded"))
    for file in Path("tiny").glob("tokenizer*"):
        file.unlink()
    result = run("evaluate", "tiny", "--tasks", "goings", "--include-path", "mine")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: the model has no tokenizer to read zero-shot tasks with\n"


@pytest.mark.usefixtures("mine")
def test_a_model_that_does_not_load_is_one_line(run: Any) -> None:
    Path("broken").mkdir()
    Path("broken/config.json").write_text('{"model_type": "llama"')
    result = run("evaluate", "broken", "--tasks", "goings", "--include-path", "mine")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: cannot load model 'broken': ")


def test_evaluation_on_calibration_text_is_warned_of(folder: Path, run: Any, prune: Any) -> None:
    assert prune("--top-up", "uniform", "--out", "pruned").exit_code == 0
    same = run("evaluate", "pruned", "--data", "rows.jsonl", "--json")
    assert same.exit_code == 0 and json.loads(same.stdout)["windows"] == 8
    assert same.stderr.startswith("Warning: calibration on 'rows.jsonl' and evaluation on 'rows.j")
    assert "100 %" in same.stderr
    assert run("evaluate", "tiny", "--data", "rows.jsonl", "--json").stderr == ""
    other = run("evaluate", "pruned", "--data", "text.txt", "--length", 16, "--json")
    assert (other.exit_code, other.stderr) == (0, "")
