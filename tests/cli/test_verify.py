"""`neuroal verify`: zeros that are still zero, and zeros that are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

UNSTRUCTURED = ("--pruner", "magnitude", "--top-up", "uniform", "--sparsity", 0.6, "-q")
PATTERN = ("--pruner", "magnitude", "--top-up", "uniform", "--pattern", "2:4", "-q")
NAME = "model.layers.1.mlp.up_proj"


def ok(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return result


def change(folder: str, name: str, new: Any) -> None:
    file = Path(folder, "model.safetensors")
    tensors = load_file(file)
    tensors[f"{name}.weight"] = new(tensors[f"{name}.weight"])
    save_file(tensors, file, metadata={"format": "pt"})


def one_weight_back(weight: torch.Tensor) -> torch.Tensor:
    row, column = (weight == 0).nonzero()[5].tolist()
    weight[row, column] = 1e-9
    return weight


def moved(weight: torch.Tensor) -> torch.Tensor:
    """As many zeros, but one elsewhere in its group of four."""
    group = weight.view(-1, 4)[3]
    gone, there = int((group == 0).nonzero()[0]), int((group != 0).nonzero()[0])
    group[gone], group[there] = group[there].clone(), 0.0
    return weight


@pytest.mark.parametrize("masks", [(), ("--save-masks",)])
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_run_as_it_was_left(
    masks: tuple[str, ...], stream: str, folder: Path, run: Any, streaming: None
) -> None:
    ok(run("prune", "tiny", *UNSTRUCTURED, *masks, "--out", "sparse"))
    ok(run("pack", "sparse", "--out", "packed", "-q"))
    weights = {n: t for n, t in load_file("sparse/model.safetensors").items() if "_proj" in n}
    count = sum(t.numel() for t in weights.values())
    zeros = sum(int((t == 0).sum()) for t in weights.values())
    for name in ("sparse", "packed"):
        said = ok(run("verify", name, stream)).stdout
        assert said.splitlines()[-1].split() == [
            *("unstructured", str(len(weights)), f"{count:,}", f"{zeros:,}", "0", "0")
        ]
        assert ok(run("verify", name, "-q")).stdout == ""


@pytest.mark.parametrize("masks", [(), ("--save-masks",)])
def test_a_zero_that_came_back(masks: tuple[str, ...], folder: Path, run: Any) -> None:
    ok(run("prune", "tiny", *UNSTRUCTURED, *masks, "--out", "sparse"))
    change("sparse", NAME, one_weight_back)
    result = run("verify", "sparse", "--json")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"in 1 of 14 linears; '{NAME}': 1 of 922 zeros are lost" in result.stderr
    said = json.loads(result.stdout)
    assert not said["holds"] and said["patterns"][0]["lost"] == 1
    assert [x["name"] for x in said["linears"] if not x["holds"]] == [NAME]


def test_zeros_of_another_run(folder: Path, run: Any) -> None:
    """As many zeros are no proof: these are elsewhere, which only the other run can tell."""
    ok(run("prune", "tiny", *UNSTRUCTURED, "--save-masks", "--out", "sparse"))
    shutil.copytree("sparse", "tuned")
    Path("tuned/masks.safetensors").unlink()
    change("tuned", NAME, moved)
    ok(run("verify", "tuned", "-q"))
    for against in ("sparse", "sparse/masks.safetensors"):
        result = run("verify", "tuned", "--against", against, "-q")
        assert result.exit_code == 1 and "1 of 922 zeros are lost" in result.stderr
    Path("sparse/masks.safetensors").unlink()  # then its weights say which
    assert run("verify", "tuned", "--against", "sparse", "-q").exit_code == 1
    said = json.loads(Path("tuned/neuroal.json").read_text())
    Path("tuned/neuroal.json").write_text(json.dumps(said | {"parent": {"name": "sparse"}}))
    assert "zeros are lost" in run("verify", "tuned", "-q").stderr


def test_groups_of_a_pattern(folder: Path, run: Any) -> None:
    ok(run("prune", "tiny", *PATTERN, "--keep", "first:1", "--out", "sparse"))
    said = ok(run("verify", "sparse")).stdout
    assert said.splitlines()[-1].split()[:2] == ["2:4", "7"]
    shutil.copytree("sparse", "other")

    def across(weight: torch.Tensor) -> torch.Tensor:
        """Exchange a zero and a weight of two groups: as many zeros, two broken groups at most."""
        flat = weight.view(-1, 4)
        zero, there = int((flat[0] == 0).nonzero()[0]), int((flat[1] != 0).nonzero()[0])
        flat[0, zero], flat[1, there] = flat[1, there].clone(), 0.0
        return weight

    change("other", NAME, across)
    result = run("verify", "other", "-q")
    assert result.exit_code == 1
    assert f"'{NAME}': 1 groups have more weights than 2:4" in result.stderr


def test_a_pattern_that_varies(folder: Path, run: Any) -> None:
    given = ("--pruner", "magnitude", "--top-up", "uniform", "--pattern", "4:8")
    given += ("--sparsity", "0.25,0.75")
    ok(run("prune", "tiny", *given, "--out", "sparse", "-q"))
    said = ok(run("verify", "sparse", "--json")).stdout
    assert [x["pattern"] for x in json.loads(said)["patterns"]] == ["6:8", "2:8"]


def test_what_is_refused(folder: Path, run: Any) -> None:
    ok(run("prune", "tiny", *UNSTRUCTURED, "--out", "sparse"))
    for arguments, message in (
        (("verify", "tiny"), "'tiny' is no run, it holds no neuroal.json: say by --against"),
        (("verify", "sparse", "--against", "tiny"), "neither a run's folder nor a file of masks"),
        (("verify", "sparse", "--against", "nothing"), "neither a run's folder nor a file"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_parent_that_is_gone(folder: Path, run: Any) -> None:
    ok(run("prune", "tiny", *UNSTRUCTURED, "--out", "sparse"))
    said = json.loads(Path("sparse/neuroal.json").read_text())
    Path("sparse/neuroal.json").write_text(json.dumps(said | {"parent": {"name": "gone"}}))
    result = run("verify", "sparse")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "'gone', of which 'sparse' was made, is not there: say by --against" in result.stderr


@pytest.mark.parametrize("against", ["sparse", "sparse/masks.safetensors"])
def test_a_model_that_was_made_of_a_run_by_others(against: str, folder: Path, run: Any) -> None:
    """Nobody's merging writes a neuroal.json: the other run says what the pattern is."""
    from transformers import AutoModelForCausalLM

    ok(run("prune", "tiny", *PATTERN, "--save-masks", "--out", "sparse"))
    AutoModelForCausalLM.from_pretrained("sparse").save_pretrained("merged")
    said = ok(run("verify", "merged", "--against", against)).stdout
    assert said.splitlines()[-1].split()[:2] == ["2:4", "14"]
    change("merged", NAME, one_weight_back)
    result = run("verify", "merged", "--against", against, "-q")
    assert result.exit_code == 1 and "1 of 768 zeros are lost" in result.stderr
    assert "1 groups have more weights than 2:4" in result.stderr
