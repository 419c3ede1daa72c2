"""The plan of a run: what it says comes true, and it reads no weight and writes no file."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import neuroal
from neuroal import Recipe, UsageError
from neuroal.cost.offload import Offload
from neuroal.cost.plan import plan
from neuroal.cost.preparation import prepare
from neuroal.model import pretrained
from neuroal.testing import tiny_model

CASES: dict[str, dict[str, Any]] = {
    "neuroal": {},
    "block step": {"top_up": "neuroal-block"},
    "row step": {"top_up": "neuroal-row"},
    "uniform": {"top_up": "uniform"},
    "magnitude": {"pruner": "magnitude"},
    "magnitude, block step": {"pruner": "magnitude", "top_up": "neuroal-block"},
    "magnitude, uniform": {"pruner": "magnitude", "top_up": "uniform"},
    "cosine": {"alignment": "cosine"},
}


def of_the_steps(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with changes, and with options for the steps that are left alone."""
    top_up = changes.get("top_up", "neuroal")
    used = {
        "linear_schedule": top_up in ("neuroal", "neuroal-block"),
        "neuroal": top_up in ("neuroal", "neuroal-row"),
    }
    options = {k: v for k, v in recipe.options.items() if used[k]}
    return dataclasses.replace(recipe, options=options, **changes)


@pytest.mark.parametrize("case", CASES)
def test_block_runs_are_as_planned(
    case: str, models: Mapping[str, Path], from_file: Recipe, tmp_path: Path
) -> None:
    recipe = of_the_steps(from_file, CASES[case] | {"model": str(models["llama"])})
    planned = plan(prepare(recipe))
    report = neuroal.prune(models["llama"], recipe=recipe, out=tmp_path / "out")
    assert report.counts["block_runs"] == planned.block_runs
    assert report.counts["weights"] == planned.weights
    assert [p["name"] for p in report.plugins] == [p.name for p in planned.prepared.setup.plugins]


def test_block_runs_by_hand(models: Mapping[str, Path], from_file: Recipe) -> None:
    """3 blocks, 2 search windows, 6 windows, 2 candidates in each step.

    A step: the first block dense once, then two candidates three times pruned and twice more dense:
    2 (1 + 2 (3 + 2)) = 22. The final pruning: 6 (2 * 3 - 1) = 30, for nobody reads the last
    block's output.
    """
    made = plan(prepare(dataclasses.replace(from_file, model=str(models["llama"]))))
    assert made.block_runs == 22 + 22 + 30
    assert [(s.role, s.plugin, s.candidates) for s in made.prepared.steps] == [
        ("block_ratios", "linear_schedule", 2),
        ("row_ratios", "neuroal", 2),
    ]
    assert made.weights == 3 * (4 * 32 * 32 + 3 * 32 * 48)
    assert made.needs.memory(Offload()) > 4 * made.weights
    data = json.loads(json.dumps(made.to_json()))
    assert (data["blocks"], data["linears"], data["block_runs"]) == (3, 21, 74)
    assert (data["windows"], data["length"]) == (6, None)


BUDGETS: dict[str, dict[str, Any]] = {
    "best": {"top_up": "best"},
    "best-slow": {"top_up": "best-slow"},
    "few": {"top_up": "best", "options": {"sensitivity": {"candidates": 9.5}}},
    "golden section": {"block_ratios": ("lambda_search",), "row_ratios": "uniform"},
}


@pytest.mark.parametrize("case", BUDGETS)
def test_a_search_costs_at_most_what_it_says(
    case: str, models: Mapping[str, Path], from_file: Recipe, tmp_path: Path
) -> None:
    changes = {"options": {}} | BUDGETS[case] | {"model": str(models["llama"])}
    recipe = dataclasses.replace(from_file, **changes)
    planned = plan(prepare(recipe))
    assert not planned.open_ended
    report = neuroal.prune(models["llama"], recipe=recipe, out=tmp_path / "out")
    uniform = dataclasses.replace(recipe, top_up="uniform", block_ratios=None, options={})
    others = plan(prepare(uniform)).block_runs
    assert others < report.counts["block_runs"] <= planned.block_runs


def test_a_budget_in_candidates_by_hand(models: Mapping[str, Path], from_file: Recipe) -> None:
    """3 blocks on 2 windows, 10 candidates of 2 * 3 * 2 block runs, and the reference of 6."""
    asked: dict[str, float] = {"candidates": 9.5}
    options = {"sensitivity": asked}
    changes = {"model": str(models["llama"]), "top_up": "best", "options": options}
    made = plan(prepare(dataclasses.replace(from_file, **changes)))
    (step,) = (s for s in made.prepared.steps if s.role == "block_ratios")
    assert (step.candidates, step.goes_on, step.most) == (1, True, 9.5)
    assert made.work["search"].block_runs == 10 * 12 + 6
    options["sensitivity"] = asked | {"block_runs": 100}  # in place of candidates
    assert plan(prepare(dataclasses.replace(from_file, **changes))).open_ended


def test_plan_reads_no_weights_and_writes_nothing(
    models: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((models["opt"] / "config.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "load", None)
    made = plan(prepare(dataclasses.replace(from_file, model=str(folder))))
    assert len(made.prepared.layout.linears) == 18
    assert all(p.is_meta for p in pretrained.skeleton(str(folder)).parameters())
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "config.json"]


def test_plan_of_a_large_model_is_quick(from_file: Recipe, tmp_path: Path) -> None:
    config = tiny_model("llama").config.to_dict()  # type: ignore[operator,union-attr]
    config |= {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000}
    config |= {"dtype": "float16", "head_dim": 128, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = Recipe(model=str(tmp_path), calibration=from_file.calibration, length=2048)
    made = plan(prepare(recipe))
    assert made.weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    search = 8 * (14 + 15) * (2 * 32 - 1) + 2 * 8
    assert made.block_runs == search + 128 * (2 * 32 - 1)
    assert 13 << 30 < made.needs.memory(Offload()) < 26 << 30
    assert made.needs.memory(Offload(True)) < made.needs.memory(Offload()) - (10 << 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "needs a model"),
        ({"pruner": "wandra"}, "did you mean 'wanda'"),
        ({"options": {"neuroal": {"lambda": 1}}}, "lambdas"),
        ({"calibration": "missing.jsonl"}, "does not exist"),
    ],
)
def test_plan_refuses_what_a_run_would(
    changes: Mapping[str, Any], message: str, models: Mapping[str, Path], from_file: Recipe
) -> None:
    recipe = dataclasses.replace(from_file, **({"model": str(models["llama"])} | dict(changes)))
    with pytest.raises(UsageError, match=message):
        prepare(recipe)


@pytest.mark.parametrize(
    ("capable", "dtype", "search", "said"),
    [
        (False, "bfloat16", "auto", "--search-dtype float32 for the search, --dtype float32"),
        (False, "bfloat16", "float32", "in float32: --dtype float32 for everything"),
        (False, "float32", "auto", ""),
        (True, "bfloat16", "auto", ""),
    ],
)
def test_a_cpu_that_is_slow_in_half_precision(
    capable: bool,
    dtype: str,
    search: str,
    said: str,
    recipe: Recipe,
    models: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("neuroal.model.pretrained.multiplies", lambda _: capable)
    changes = {"dtype": dtype, "search_dtype": search, "device": "cpu"}
    asked = dataclasses.replace(recipe, model=str(models["llama"]), **changes)
    notes = [note for note in plan(prepare(asked)).notes if "slower in" in note]
    assert len(notes) == bool(said) and all(said in note for note in notes)
