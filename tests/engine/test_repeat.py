"""One recipe, one result: the same bytes, from the recipe or from its report, and by allocation."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import neuroal
from neuroal import Recipe, Report, UsageError
from neuroal.search.alignment import Aligner
from neuroal.testing import tiny_model

Digests = Callable[[Path], dict[str, str]]
FILES = {"allocation.safetensors", "model.safetensors"}


@pytest.fixture(scope="module")
def first(
    models: Mapping[str, Path], from_file: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:
    """A finished run on mistral."""
    out = tmp_path_factory.mktemp("first") / "out"
    return out, neuroal.prune(models["mistral"], recipe=from_file, out=out)


def test_two_runs_are_byte_identical(
    first: tuple[Path, Report],
    models: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
    digests: Digests,
) -> None:
    torch.manual_seed(99)  # a global generator has no say
    torch.rand(7)
    report = neuroal.prune(models["mistral"], recipe=from_file, out=tmp_path / "again")
    assert digests(tmp_path / "again") == digests(first[0])
    assert digests(first[0]).keys() == FILES
    for key in ("candidates", "sparsity", "linears", "blocks", "counts", "plugins", "data"):
        assert getattr(report, key) == getattr(first[1], key)


def test_recipe_of_the_report_repeats_the_run(
    first: tuple[Path, Report], tmp_path: Path, digests: Digests
) -> None:
    data = json.loads((first[0] / "neuroal.json").read_text())
    recipe = Recipe.from_json(data["recipe"])
    assert recipe.model is not None
    report = neuroal.prune(recipe.model, recipe=recipe, out=tmp_path / "again")
    assert digests(tmp_path / "again") == digests(first[0])
    assert report.recipe_sha256 == data["recipe_sha256"]


def test_seed_is_part_of_the_recipe(first: tuple[Path, Report], from_file: Recipe) -> None:
    model = first[1].recipe["model"]
    other = dataclasses.replace(from_file, model=model, seed=1)
    assert other.digest() != first[1].recipe_sha256
    assert dataclasses.replace(other, seed=0).digest() == first[1].recipe_sha256


def test_search_uses_the_first_windows_alone(recipe: Recipe, windows: Tensor) -> None:
    changed = windows.clone()
    changed[recipe.search_samples :] = changed[recipe.search_samples :].flip(1)
    one = neuroal.prune(tiny_model("llama"), None, recipe, windows=windows)
    other = neuroal.prune(tiny_model("llama"), None, recipe, windows=changed)
    assert one.candidates == other.candidates
    assert one.data is not None and other.data is not None
    assert one.data["sha256"] != other.data["sha256"]


def test_allocation_file_holds_every_ratio(first: tuple[Path, Report]) -> None:
    ratios = load_file(first[0] / "allocation.safetensors")
    report = first[1]
    assert ratios.keys() == report.linears.keys()
    for name, ratio in ratios.items():
        assert ratio.dtype == torch.float64
        assert float(ratio.mean()) == pytest.approx(report.linears[name]["achieved"], abs=0.02)


@pytest.mark.parametrize("as_file", [True, False])
def test_allocation_on_another_pruner(
    as_file: bool,
    first: tuple[Path, Report],
    models: Mapping[str, Path],
    tmp_path: Path,
    digests: Digests,
) -> None:
    source = first[0] / "allocation.safetensors" if as_file else first[0]
    recipe = Recipe(sparsity=0.6, pruner="magnitude", allocation=str(source), device="cpu")
    report = neuroal.prune(models["mistral"], recipe=recipe, out=tmp_path / "out")
    assert report.candidates == [] and report.counts["block_runs"] == 0
    assert report.plugins[0]["name"] == "magnitude"
    ours, theirs = digests(tmp_path / "out"), digests(first[0])
    assert ours["allocation.safetensors"] == theirs["allocation.safetensors"]
    assert ours["model.safetensors"] != theirs["model.safetensors"]
    for name, linear in report.linears.items():  # the same counts, other weights
        assert linear["achieved"] == first[1].linears[name]["achieved"]
        assert linear["rows"] == first[1].linears[name]["rows"]


def test_allocation_with_the_same_pruner_repeats_the_search_result(
    first: tuple[Path, Report],
    models: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
    digests: Digests,
) -> None:
    recipe = dataclasses.replace(from_file, allocation=str(first[0]), options={})
    neuroal.prune(models["mistral"], recipe=recipe, out=tmp_path / "out")
    assert digests(tmp_path / "out") == digests(first[0])


def test_uniform_allocation_is_one_number_per_linear(
    models: Mapping[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    asked = dataclasses.replace(recipe, pruner="magnitude", top_up="uniform", options={})
    neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "out")
    ratios = load_file(tmp_path / "out" / "allocation.safetensors")
    assert {tuple(r.shape) for r in ratios.values()} == {(1,)}
    assert {float(r) for r in ratios.values()} == {0.6}


@pytest.mark.parametrize(
    ("structure", "message"),
    [("llama", "k_proj"), ("phi", "linear")],  # other rows; other linears
)
def test_allocation_of_another_model(
    structure: str,
    message: str,
    first: tuple[Path, Report],
    models: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    recipe = Recipe(sparsity=0.6, pruner="magnitude", allocation=str(first[0]), device="cpu")
    with pytest.raises(neuroal.NeuroalError, match="does not fit the model") as error:
        neuroal.prune(models[structure], recipe=recipe, out=tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_broken_allocation(models: Mapping[str, Path], tmp_path: Path) -> None:
    for name, content in (("missing", None), ("broken", b"nothing")):
        file = tmp_path / f"{name}.safetensors"
        if content is not None:
            file.write_bytes(content)
        recipe = Recipe(sparsity=0.6, pruner="magnitude", allocation=str(file), device="cpu")
        with pytest.raises(neuroal.NeuroalError, match=name) as error:
            neuroal.prune(models["llama"], recipe=recipe, out=tmp_path / "out")
        assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["broken.safetensors"]


def test_allocation_and_ratio_plugins_exclude_each_other(tmp_path: Path) -> None:
    recipe = Recipe(sparsity=0.5, allocation=str(tmp_path), row_ratios="neuroal")
    with pytest.raises(neuroal.UsageError, match="holds every ratio"):
        neuroal.prune(tiny_model("llama"), None, recipe)


def test_in_memory_and_by_path_agree_on_every_structure(
    structure: str,
    models: Mapping[str, Path],
    recipe: Recipe,
    from_file: Recipe,
    windows: Tensor,
    tmp_path: Path,
    digests: Digests,
) -> None:
    model: nn.Module = tiny_model(structure)
    neuroal.prune(model, None, recipe, windows=windows, out=tmp_path / "memory")
    neuroal.prune(models[structure], recipe=from_file, out=tmp_path / "path")
    assert digests(tmp_path / "memory") == digests(tmp_path / "path")
    one, other = (
        json.loads((tmp_path / k / "neuroal.json").read_text()) for k in ("memory", "path")
    )
    same: list[Any] = [
        {k: d[k] for k in ("candidates", "linears", "plugins")} for d in (one, other)
    ]
    assert same[0] == same[1]
    assert one["data"]["sha256"] == other["data"]["sha256"]


# -- importance of rows ------------------------------------------------------------------------

SLOW: dict[str, Any] = {
    "pruner": "sparsegpt",
    "top_up": "best-slow",
    "options": {
        "sensitivity": {"candidates": 3},
        "row_sensitivity": {"candidates": 60, "probe_windows": 1},
    },
}


@pytest.fixture(scope="module")
def weighed(
    models: Mapping[str, Path], from_file: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:
    """A finished run of `best-slow` under SparseGPT, whose rows have importance."""
    out = tmp_path_factory.mktemp("weighed") / "out"
    recipe = dataclasses.replace(from_file, **SLOW)
    return out, neuroal.prune(models["mistral"], recipe=recipe, out=out)


def test_importance_is_in_the_allocation_file(weighed: tuple[Path, Report]) -> None:
    folder, report = weighed
    tensors = load_file(folder / "allocation.safetensors")
    importance = {n: x for n, x in tensors.items() if n.endswith(":importance")}
    assert importance and {n.removesuffix(":importance") for n in importance} <= set(report.linears)
    assert all(bool((x > 0).all()) and float(x.std()) > 0 for x in importance.values())
    (chosen,) = [c for c in report.candidates if c["selected"] and c["role"] == "row_ratios"]
    assert chosen["plugin"] == "row_sensitivity" and chosen["parameters"] != {"rows": "alike"}
    assert report.counts["pruned"] == int(0.6 * report.counts["weights"] + 0.5)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
def test_importance_on_another_pruner(
    pruner: str,
    weighed: tuple[Path, Report],
    models: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
    digests: Digests,
) -> None:
    """The same counts, of rows that compete; what stays keeps its bits."""
    asked = {"pruner": pruner, "options": {}, "allocation": str(weighed[0])}
    out = tmp_path / "out"
    report = neuroal.prune(
        models["mistral"], recipe=dataclasses.replace(from_file, **asked), out=out
    )
    ids = ("allocation.safetensors", "model.safetensors")
    assert digests(out)[ids[0]] == digests(weighed[0])[ids[0]]
    importance = load_file(out / "allocation.safetensors")
    dense, pruned = (load_file(f / "model.safetensors") for f in (models["mistral"], out))
    spreads = []
    for name, x in report.linears.items():
        assert x["achieved"] == weighed[1].linears[name]["achieved"]
        before, after = dense[f"{name}.weight"], pruned[f"{name}.weight"]
        kept = after != 0
        assert after[kept].equal(before[kept])
        if pruner == "magnitude" and f"{name}:importance" in importance:
            scores = before.abs() * importance[f"{name}:importance"].float()[:, None]
            assert float(scores[~kept].max()) <= float(scores[kept].min())
            spreads.append(x["rows"]["max"] - x["rows"]["min"])
    assert pruner != "magnitude" or max(spreads) > 0.1


def test_importance_resumes_to_the_same_bits(
    weighed: tuple[Path, Report],
    models: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
    digests: Digests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the row step, whose earlier candidates are then read back."""
    recipe = dataclasses.replace(from_file, **SLOW)
    measure = Aligner.measure
    asked = []

    def stops(self: Aligner, trials: Any, *rest: Any) -> Any:
        asked.append(any(t.importance is not None for x in trials for t in x.targets.values()))
        if sum(asked) == 4:
            raise KeyboardInterrupt
        return measure(self, trials, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Aligner, "measure", stops)
        neuroal.prune(models["mistral"], recipe=recipe, out=tmp_path / "out")
    report = neuroal.prune(models["mistral"], recipe=recipe, out=tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(weighed[0])
    assert report.candidates == weighed[1].candidates


def test_importance_and_comparison_by_row_exclude_each_other(
    weighed: tuple[Path, Report], models: Mapping[str, Path], tmp_path: Path
) -> None:
    recipe = Recipe(
        sparsity=0.6, pruner="magnitude", comparison="row", allocation=str(weighed[0]), device="cpu"
    )
    with pytest.raises(UsageError, match=r"importance of rows in .* drop --comparison row$"):
        neuroal.prune(models["mistral"], recipe=recipe, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_importance_is_compared_and_reported(
    weighed: tuple[Path, Report], first: tuple[Path, Report]
) -> None:
    from neuroal.evaluation.comparison import read_side
    from neuroal.html_report.allocation_figures import row_ratios
    from neuroal.html_report.reading import read_run

    sides = [read_side(str(folder)) for folder, _ in (weighed, first)]
    assert sides[0].wanted is not None and sides[1].wanted is not None
    assert sides[0].wanted.keys() == sides[1].wanted.keys() == weighed[1].linears.keys()
    alone = read_side(str(weighed[0] / "allocation.safetensors"))
    assert alone.ratios == sides[0].wanted
    figures = [row_ratios(read_run(folder)) for folder, _ in (weighed, first)]
    assert "The rows of a linear compete for its ratio" in figures[0].caption
    assert "compete" not in figures[1].caption
