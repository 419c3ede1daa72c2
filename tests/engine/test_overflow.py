"""A model that overflows in half precision is told so, whatever plugin sees it first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch import Tensor, nn

import neuroal
from neuroal import NeuroalError, Recipe
from neuroal.cli import main
from neuroal.layout import find, matrices
from neuroal.testing import tiny_model
from neuroal.walk import walker

SAID = "not finite: the model overflows in float16; give --dtype bfloat16 or float32"


def overflowing() -> nn.Module:
    """A tiny Llama in float16 whose second MLP gives more than 65504, but not in float32."""
    model = tiny_model("llama", blocks=2)
    x = find(model).linears["model.layers.1.mlp.up_proj"]
    matrices.weight(x, model).mul_(3e4)
    return model


CASES: dict[str, dict[str, Any]] = {
    "search": {},
    "uniform": {"top_up": "uniform"},
    **{p: {"pruner": p, "top_up": "uniform"} for p in ("ria", "sparsegpt", "admm", "alps")},
    "a mover's search": {"pruner": "sparsegpt", "top_up": "neuroal-block"},
    "dsnot": {"top_up": "dsnot"},
    "swaps": {"refiner": "sparseswaps", "pruner": "magnitude", "top_up": "uniform"},
    "dense walk": {"top_up": "owl"},
    "compares": {"alignment": "relative_l2"},
}


def prune(model: nn.Module, windows: Tensor, **recipe: Any) -> None:
    given = {"samples": 6, "search_samples": 2, "device": "cpu"} | recipe
    neuroal.prune(model, recipe=Recipe(**given), windows=windows)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "as on a device"])
@pytest.mark.parametrize("case", CASES)
def test_the_linear_and_the_dtype_are_named(
    case: str, late: bool, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if late:
        if case == "dense walk":
            pytest.skip("its plugin reads the statistics first")
        monkeypatch.setattr(walker, "_at_once", lambda device: False)
    with pytest.raises(NeuroalError) as caught:
        prune(overflowing().half(), windows, **CASES[case])
    assert str(caught.value) == f"the input of model.layers.1.mlp.down_proj is {SAID}"


def test_logits_too(windows: Tensor) -> None:
    with pytest.raises(NeuroalError) as caught:
        changes = {"pruner": "magnitude", "top_up": "neuroal-block", "alignment": "output_kl"}
        prune(overflowing().half(), windows, **changes)
    assert str(caught.value) == f"logits of the model are {SAID}"


def test_the_dtype_of_the_search_is_named(windows: Tensor) -> None:
    with pytest.raises(NeuroalError, match="give --search-dtype bfloat16 or float32"):
        prune(overflowing(), windows, search_dtype="float16")
    prune(overflowing(), windows)
    prune(overflowing().bfloat16(), windows)


def test_from_the_command_line(
    save: Callable[[nn.Module, Path], Path], from_file: Recipe, tmp_path: Path
) -> None:
    source = save(overflowing(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 40)

    def run(*words: object) -> Any:
        return CliRunner().invoke(main, [str(w) for w in words], prog_name="neuroal")

    data = ("--calibration", from_file.calibration, "--samples", 6, "--search-samples", 2)
    done = run("prune", source, *data, "--dtype", "float16", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert f"Error: the input of model.layers.1.mlp.down_proj is {SAID}\n" in done.output
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    text = ("--data", tmp_path / "text.txt", "--length", 16)
    half = run("evaluate", source, *text, "--dtype", "float16")
    assert half.exit_code == 0 and f"is nan: the logits are {SAID}" in half.output
    done = run("evaluate", source, *text, "--dtype", "float16", "--json")
    found = json.loads(done.stdout)
    assert found["perplexity"] == "nan" and found["reason"] == f"the logits are {SAID}"
    assert "reason" not in json.loads(run("evaluate", source, *text, "--json").stdout)
