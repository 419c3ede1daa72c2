"""The other commands, their help, their JSON, and how they end."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from transformers import AutoModelForCausalLM

from neuroal.cli import main
from neuroal.cli.command import GroupedOption
from neuroal.cli.demo import DemoRow, verdict
from neuroal.testing import tiny_model

demo = importlib.import_module("neuroal.cli.demo")  # its room has the command by this name

Start = Callable[..., subprocess.Popen[str]]

COMMANDS = {
    "prune": main.commands["prune"],
    "evaluate": main.commands["evaluate"],
    "compare": main.commands["compare"],
    "layout": main.commands["layout"],
    "demo": main.commands["demo"],
    **{f"plugins {name}": command for name, command in main.commands["plugins"].commands.items()},  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, run: Any) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    assert f"Usage: neuroal {name}" in result.stdout
    assert f"Examples:\n  neuroal {name}" in result.stdout
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            assert isinstance(parameter, GroupedOption)
            assert parameter.help
            assert parameter.opts[0] in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name: str, folder: Path) -> None:
    for example in COMMANDS[name].examples:  # type: ignore[attr-defined]
        words = example.split()
        assert words[: 1 + len(name.split())] == ["neuroal", *name.split()]
        command = COMMANDS[name]
        command.make_context(name, words[1 + len(name.split()) :], resilient_parsing=False).close()


def test_group_without_a_command_shows_its_help(run: Any) -> None:
    assert "Commands:" in run().stdout and run().exit_code == 0
    _, _, listed = run().stdout.partition("Commands:")
    assert "..." not in listed  # no sentence is cut
    assert "check" in run("plugins").stdout and run("plugins").exit_code == 0
    assert run("--version").stdout.startswith("neuroal, version ")


def test_evaluate(folder: Path, run: Any) -> None:
    result = run("evaluate", "tiny", "--data", "text.txt", "--length", 32, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    text = Path("text.txt").read_text()
    assert said["windows"] == len(text) // 32 and said["length"] == 32
    assert (said["model"], said["data"], said["dtype"]) == ("tiny", "text.txt", "float32")
    assert len(said["sha256"]) == 64
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained("tiny")(text)["input_ids"])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    model = AutoModelForCausalLM.from_pretrained("tiny")
    with torch.no_grad():
        losses = [float(model(w[None], labels=w[None]).loss) for w in ids]
    assert said["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    table = run("evaluate", "tiny", "--data", "text.txt", "--length", 32).stdout
    assert f"{said['perplexity']:.4f}" in table and said["sha256"] in table
    quiet = run("evaluate", "tiny", "--data", "text.txt", "--length", 32, "-q").stdout
    assert quiet == f"{said['perplexity']:.4f}\n"


def test_evaluate_in_half_precision_and_rows(folder: Path, run: Any) -> None:
    given = ("--data", "rows.jsonl", "--windows", 3, "--dtype", "bfloat16", "--json")
    said = json.loads(run("evaluate", "tiny", *given).stdout)
    assert (said["dtype"], said["windows"], said["length"]) == ("bfloat16", 3, 16)


def test_layout(folder: Path, run: Any) -> None:
    text = run("layout", "tiny").stdout
    assert text.count("\nself_attn.q_proj ") == 1
    assert "blocks 0 to 1" in text and "48 × 32" in text
    assert "self_attn.q_proj (next block)" in text
    assert "(block 1 is the last: nothing consumes mlp.down_proj)" in text
    every = run("layout", "tiny", "--all").stdout
    assert "block 0 (model.layers.0)" in every and "block 1 (model.layers.1)" in every
    assert any(x.endswith("none") for x in every.splitlines() if x.startswith("mlp.down_proj"))
    said = json.loads(run("layout", "tiny", "--json").stdout)
    assert said["weights"] == 17_408 and said["linears"] == 14
    linear = said["blocks"][0]["linears"][0]
    assert linear == {
        "name": "model.layers.0.self_attn.q_proj",
        "out_features": 32,
        "in_features": 32,
        "weights": 1024,
        "group": 0,
        "part": "attention",
        "paired": "model.layers.0.self_attn.o_proj",
        "fed": None,
        "rows": {"q": [[0, 32]]},
        "parameter": "model.layers.0.self_attn.q_proj.weight",
        "transposed": False,
        "expert": None,
        "kept": False,
    }
    gate = said["blocks"][0]["linears"][4]
    assert gate["fed"] == {"linear": "model.layers.0.mlp.down_proj", "runs": [[0, 0, 48]]}
    assert said["dense"] == []
    assert said["blocks"][1]["linears"][-1]["paired"] is None


@pytest.mark.parametrize("structure", ["mistral", "phi", "opt"])
def test_layout_of_other_structures(structure: str, folder: Path, run: Any) -> None:
    tiny_model(structure).save_pretrained(structure)  # type: ignore[operator]
    text = run("layout", structure).stdout
    assert "blocks 0 to 2" in text
    assert f"{structure}: 3 blocks" in text


def test_plugins_list(run: Any) -> None:
    text = run("plugins", "list").stdout
    assert "wanda" in text and "neuroal-block" in text
    rows = run("plugins", "list", "--role", "row-ratios").stdout
    assert "neuroal" in rows and "wanda" not in rows
    said = json.loads(run("plugins", "list", "--role", "pruner", "--json").stdout)["plugins"]
    assert {"magnitude", "wanda"} <= {p["name"] for p in said}
    assert {p["role"] for p in said} == {"pruner"}
    assert {p["status"] for p in said} == {"ok"}
    result = run("plugins", "list", "--role", "prunr")
    assert result.stderr == "Error: unknown role 'prunr': did you mean 'pruner'?\n"
    assert result.exit_code == 2


def test_plugins_show(run: Any) -> None:
    wanda = run("plugins", "show", "wanda").stdout
    assert "Sun et al. 2023" in wanda and "score_weights" in wanda and "no options" in wanda
    source = re.search(r"^source: (.+)$", wanda, re.MULTILINE)
    assert source is not None
    digest = hashlib.sha256(Path(source[1]).read_bytes()).hexdigest()
    assert f"sha256: {digest}" in wanda
    text = run("plugins", "show", "neuroal").stdout
    assert "row_ratios neuroal" in text and "top_up neuroal" in text
    assert "neuroal.lambdas: list of float" in text
    assert "excess" not in text and re.search(r"^refiner +none$", text, re.MULTILINE)
    medium = run("plugins", "show", "medium").stdout
    assert "ln(perplexity / dense perplexity) it leaves 0.5 with 4,096 tokens" in medium
    assert "sensitivity.candidates=5, admm.damping=0.3" in medium
    assert "row_ratios" not in run("plugins", "show", "wanda").stdout
    said = json.loads(run("plugins", "show", "uniform", "--json").stdout)["plugins"]
    assert {p["role"] for p in said} == {"block_ratios", "row_ratios", "top_up"}
    result = run("plugins", "show", "wnda")
    assert result.stderr == "Error: unknown plugin 'wnda': did you mean 'wanda'?\n"
    assert result.exit_code == 2


def test_plugins_check(run: Any) -> None:
    result = run("plugins", "check", "wanda", "neuroal")
    assert result.exit_code == 0, result.stdout
    assert ", 0 broken" in result.stdout


def test_plugins_check_finds_a_broken_distribution(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "strange-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[neuroal.alignment]\nstrange = no_such_module:Strange\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "strange 1.0" in run("plugins", "list").stdout
    result = run("plugins", "check", "--role", "alignment")
    assert result.exit_code == 1
    assert "does not import" in result.stdout and ", 1 broken" in result.stdout
    said = json.loads(run("plugins", "check", "strange", "--json").stdout)
    assert said["broken"] == 1
    assert run("plugins", "show", "strange").exit_code == 1


def test_broken_pipe_is_quiet(folder: Path, start_process: Start) -> None:
    process = start_process([sys.executable, "-m", "neuroal", "plugins", "list"])
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait()


def case(pruner: str | None, top_up: str | None, wanted: float, value: float) -> DemoRow:
    return DemoRow(pruner, top_up, wanted, wanted, None, None, value, 1.0)


def test_verdict_is_computed() -> None:
    cases = [case(None, None, 0.0, 10.0)]
    for sparsity in (0.6, 0.7):
        cases += [
            case("magnitude", "uniform", sparsity, 20.0),
            case("magnitude", "neuroal", sparsity, 18.0),
            case("wanda", "uniform", sparsity, 15.0),
            case("wanda", "neuroal", sparsity, 15.0 if sparsity == 0.6 else 15.3),
        ]
    lines = verdict(cases)
    assert len(lines) == 2
    assert "70%" in lines[0] and "+100% by magnitude" in lines[0] and "+50% by wanda" in lines[0]
    assert "2 of 4" in lines[1] and "-10.0%" in lines[1] and "+2.0%" in lines[1]


WHOLE = {"SPARSITIES": demo.SPARSITIES, "SAMPLES": demo.SAMPLES, "WINDOWS": demo.WINDOWS}


@pytest.mark.parametrize(
    "size",
    [
        {"SPARSITIES": (0.7,), "SAMPLES": 2, "WINDOWS": 8},
        pytest.param(WHOLE, marks=[pytest.mark.slow, pytest.mark.matrix]),
    ],
    ids=["small", "whole"],
)
def test_demo(size: dict[str, Any], run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in size.items():
        monkeypatch.setattr(demo, name, value)
    result = run("demo", "--json")
    assert result.exit_code == 0, result.stderr
    cases = json.loads(result.stdout)["cases"]
    assert len(cases) == 1 + 4 * len(size["SPARSITIES"]) and cases[0]["pruner"] is None
    dense = cases[0]["perplexity"]
    for case in cases[1:]:
        assert case["achieved"] == pytest.approx(case["wanted"], abs=1e-5)
        assert (case["block_lam"] is None) == (case["top_up"] == "uniform")
        if (case["top_up"], case["wanted"]) == ("uniform", 0.7):
            assert case["perplexity"] > 1.2 * dense


def test_hub_name_without_the_hub(folder: Path, run: Any) -> None:
    result = run("prune", "owner/no-such-model", "--calibration", "rows.jsonl")
    assert result.stderr.startswith("Error: cannot load model 'owner/no-such-model'")
    assert result.stderr.count("\n") == 1
    assert result.exit_code == 1
