"""Ratios that a recipe or a flag gives: over depth, by pattern, from a file that has some."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

RECIPE = """
model = "tiny"
pruner = "magnitude"
sparsity = [0.2, 0.6]

[[ratios]]
match = "*.self_attn.*"
sparsity = 0.3

[[ratios]]
match = "*.o_proj"
sparsity = 0
"""


def report(folder: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(Path(folder, "neuroal.json").read_text())
    return said


def expected(name: str) -> float:
    if name.endswith(".o_proj"):
        return 0.0
    if ".self_attn." in name:
        return 0.3
    return 0.2 if ".layers.0." in name else 0.6


def test_a_recipe_in_toml(folder: Path, run: Any) -> None:
    Path("mine.toml").write_text(RECIPE)
    result = run("prune", "--recipe", "mine.toml", "--out", "out")
    assert result.exit_code == 0, result.stderr
    said = report("out")
    pruned = total = 0.0
    for name, x in said["linears"].items():
        assert x["wanted"] == expected(name)
        assert x["achieved"] == pytest.approx(expected(name), abs=1e-3)
        weights = load_file("out/model.safetensors")[f"{name}.weight"].numel()
        pruned, total = pruned + expected(name) * weights, total + weights
    assert said["sparsity"]["wanted"] == pytest.approx(pruned / total)
    assert said["counts"]["pruned"] == math.floor(pruned + 0.5)
    assert said["candidates"] == [] and said["counts"]["block_runs"] == 0
    line = "0.2, 0.6 over depth; by pattern: *.self_attn.*, *.o_proj"
    assert line in result.stdout
    plan = run("prune", "--recipe", "mine.toml", "--dry-run").stdout
    assert line in plan and f"{said['sparsity']['wanted']:g} (" in plan
    # The report repeats the run.
    again = run("prune", "--recipe", "out/neuroal.json", "--out", "again", "-q")
    assert again.exit_code == 0, again.stderr
    files = [Path(x, "model.safetensors").read_bytes() for x in ("out", "again")]
    assert files[0] == files[1]


def test_flags_are_above_the_recipe_and_keep_above_all(folder: Path, run: Any) -> None:
    Path("mine.toml").write_text(RECIPE)
    result = run(
        *("prune", "--recipe", "mine.toml", "--sparsity", 0.5, "--keep", "first:1"),
        *("--pruner", "wanda", "--calibration", "rows.jsonl", "--samples", 2, "--out", "out"),
    )
    assert result.exit_code == 0, result.stderr
    for name, x in report("out")["linears"].items():
        wanted = 0.5 if ".mlp." in name else expected(name)
        assert x["wanted"] == (0.0 if ".layers.0." in name else wanted)


def test_a_list_over_depth_from_the_command_line(folder: Path, prune: Any) -> None:
    result = prune("--sparsity", "0.2,0.6", "--pruner", "sparsegpt")
    assert result.exit_code == 0, result.stderr
    (folder,) = Path().glob("tiny-sparsegpt-ratios-0.2to0.6*/")
    said = report(str(folder))
    assert [b["wanted"] for b in said["blocks"]] == pytest.approx([0.2, 0.6])
    assert [b["achieved"] for b in said["blocks"]] == pytest.approx([0.2, 0.6], abs=1e-3)
    assert said["sparsity"]["wanted"] == pytest.approx(0.4)


def test_n_varies_over_depth(folder: Path, prune: Any) -> None:
    result = prune("--pattern", "4:8", "--sparsity", "0.25,0.75", "--out", "out")
    assert result.exit_code == 0, result.stderr
    weight = load_file("out/model.safetensors")
    for block, pruned in ((0, 2), (1, 6)):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        assert ((weight[name].view(-1, 8) == 0).sum(dim=1) == pruned).all()
    result = prune("--pattern", "4:8", "--sparsity", "0,0.5", "--out", "zero")
    assert result.exit_code == 0, result.stderr
    assert [b["achieved"] for b in report("zero")["blocks"]] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ('match = "*.atn"\nsparsity = 0.1', (), "[[ratios]] match *.atn means no linear"),
        ('match = "mlp"\nsparsity = 1.0', (), "sparsity 1 is outside [0, 1)"),
        ('mach = "mlp"\nsparsity = 0.1', (), "did you mean 'match'?"),
        ("match = ", (), "mine.toml' is not TOML"),
        (
            'match = "mlp"\nsparsity = 0.1',
            ("--row-ratios", "neuroal"),
            "the recipe gives every ratio: drop --block-ratios, --row-ratios",
        ),
        (
            'match = "mlp"\nsparsity = 0.1',
            ("--pattern", "2:4", "--sparsity", "0.4"),
            "pattern 2:4 has one N in a block: [[ratios]] are for unstructured sparsity",
        ),
    ],
)
def test_a_recipe_that_says_nothing_usable(
    folder: Path, prune: Any, recipe: str, flags: tuple[object, ...], message: str
) -> None:
    Path("mine.toml").write_text(f"[[ratios]]\n{recipe}\n")
    result = prune("--recipe", "mine.toml", "--out", "out", *flags)
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not Path("out").exists()


def test_a_recipe_that_is_not_there(folder: Path, run: Any) -> None:
    result = run("prune", "--recipe", "none.toml")
    assert result.exit_code == 2
    assert "cannot read recipe 'none.toml': No such file" in result.stderr


def test_a_file_that_names_some_linears(folder: Path, prune: Any) -> None:
    name = "model.layers.1.mlp.up_proj"
    save_file({name: torch.tensor([0.75], dtype=torch.float64)}, "some.safetensors")
    result = prune("--allocation", "some.safetensors", "--out", "no")
    assert result.exit_code == 2 and "has a ratio of 1 of 14 linears" in result.stderr
    result = prune("--allocation", "some.safetensors", "--sparsity", 0.25, "--out", "out")
    assert result.exit_code == 0, result.stderr
    said = report("out")
    assert {n for n, x in said["linears"].items() if x["wanted"] == 0.75} == {name}
    assert {x["wanted"] for n, x in said["linears"].items() if n != name} == {0.25}
    assert said["sparsity"]["wanted"] > 0.25 and "shifted" not in result.stdout


def test_a_shift_is_said_with_its_size(folder: Path, prune: Any) -> None:
    assert prune("--sparsity", 0.5, "--keep", "*.up_proj", "--out", "one", "-q").exit_code == 0
    result = prune("--allocation", "one", "--sparsity", 0.6, "--out", "two", "--pruner", "ria")
    assert result.exit_code == 0, result.stderr
    said = report("two")
    own = report("one")["sparsity"]["over_all"]
    (note,) = [n for n in said["notes"] if "shifted" in n]
    assert f"allocation 'one' has a sparsity of {own:.6g}: its ratios are shifted by +" in note
    assert note in result.stdout
    zero = [x["achieved"] for n, x in said["linears"].items() if n.endswith(".up_proj")]
    assert zero == [0.0, 0.0]
    total = said["counts"]["all_weights"]
    assert said["counts"]["pruned"] == math.floor(0.6 * total + 0.5)
