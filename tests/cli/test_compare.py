"""`neuroal compare`: two runs in one table, and what cannot be compared in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from neuroal.testing import tiny_model, tiny_tokenizer


@pytest.fixture
def two(folder: Path, prune: Any) -> None:
    """Runs `a` and `b` of one model."""
    for out, pruner, top_up in (("a", "wanda", "neuroal-block"), ("b", "magnitude", "uniform")):
        assert prune("--pruner", pruner, "--top-up", top_up, "--out", out).exit_code == 0


@pytest.mark.usefixtures("two")
def test_two_runs(run: Any) -> None:
    result = run("compare", "a", "b", "--data", "text.txt", "--length", 16)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [x.split() for x in result.stdout.splitlines()]
    assert ["pruner", "wanda", "magnitude"] in lines
    assert [x[0] for x in lines if x and x[0].startswith("model.")] == [
        "model.layers.0",
        "model.layers.1",
    ]
    assert not any("q_proj" in x for x in lines)
    every = run("compare", "a", "b", "--all").stdout
    assert every.count("self_attn.q_proj") == 2 and "perplexity" not in every


@pytest.mark.usefixtures("two")
def test_json(run: Any) -> None:
    given = ("--data", "text.txt", "--length", 16, "--windows", 9)
    said = json.loads(run("compare", "a", "b", *given, "--json").stdout)
    assert (said["a"], said["b"], said["ratios"]) == ("a", "b", "achieved")
    assert said["differences"]["pruner"] == {"a": "wanda", "b": "magnitude"}
    assert [len(x["linears"]) for x in said["blocks"]] == [7, 7]
    assert 0 < said["overall"]["masks"]["intersection_over_union"] < 1
    for name in "ab":
        alone = json.loads(run("evaluate", name, *given, "--json").stdout)
        assert said["perplexity"][name]["perplexity"] == alone["perplexity"]
    same = json.loads(run("compare", "a", "a", "--json").stdout)
    assert same["overall"]["masks"] == {"intersection_over_union": 1.0, "equal_share": 1.0}
    assert same["differences"] == {} and "perplexity" not in same
    assert "Both were asked for the same." in run("compare", "a", "a").stdout


@pytest.mark.usefixtures("two")
def test_allocations(run: Any) -> None:
    result = run("compare", "a/allocation.safetensors", "b")
    assert result.exit_code == 0 and "The ratios are the wanted ones" in result.stdout
    said = json.loads(run("compare", "a/allocation.safetensors", "b", "--json").stdout)
    assert said["ratios"] == "wanted" and "masks" not in said["overall"]


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (("a", "gone"), "'gone' is neither a run's folder nor an allocation.safetensors", 2),
        (("a", "tiny"), "folder 'tiny' is no run: it holds no neuroal.json", 2),
        (("a", "text.txt"), "cannot read 'text.txt'", 1),
        (("a", "b", "--windows", 2), "--windows is for --data, which is not given", 2),
        (("a", "other"), "are of different models: only 'a' has the linear", 2),
        (
            ("a", "b/allocation.safetensors", "--data", "text.txt"),
            "--data needs two runs: 'b/allocation.safetensors' is an allocation alone",
            2,
        ),
        (("a", "swapped"), "cannot read 'swapped/model.safetensors'", 1),
    ],
)
def test_what_cannot_be_compared(
    arguments: tuple[str, ...], says: str, code: int, run: Any
) -> None:
    if "other" in arguments:
        tiny_model("llama", blocks=1).save_pretrained("small")  # type: ignore[operator]
        tiny_tokenizer().save_pretrained("small")
        made = run(
            "prune", "small", "--pruner", "magnitude", "--top-up", "uniform", "--out", "other"
        )
        assert made.exit_code == 0
    if "swapped" in arguments:
        shutil.copytree("b", "swapped")
        Path("swapped/model.safetensors").write_bytes(b"nothing")
    result = run("compare", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert says in result.stderr
