"""`neuroal.prune` end to end: the right number of zeros, in the right places, and nothing else."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuroal
from neuroal import Recipe, Report, hookimpl
from neuroal.cost.plan import plan
from neuroal.cost.preparation import prepare
from neuroal.layout import find
from neuroal.testing import tiny_model, tiny_tokenizer
from neuroal.walk import CandidateState, Walker

Tensors = dict[str, Tensor]
Read = Callable[[Path], Tensors]
Linears = Callable[[nn.Module], Tensors]
KEYS = {
    *("schema", "recipe", "environment", "plugins", "data", "candidates", "sparsity", "linears"),
    *("timings", "counts", "peak_memory_bytes"),
}


@pytest.fixture(scope="module")
def runs(
    models: Mapping[str, Path], from_file: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Report]]:
    """The output folder and report of one run per structure, by path."""
    root = tmp_path_factory.mktemp("runs")
    made: dict[str, tuple[Path, Report]] = {}

    def run(structure: str) -> tuple[Path, Report]:
        if structure not in made:
            out = root / structure
            made[structure] = out, neuroal.prune(models[structure], recipe=from_file, out=out)
        return made[structure]

    return run


def zeros(weights: Tensors) -> int:
    return sum(int((w == 0).sum()) for w in weights.values())


def wanted_zeros(weights: Tensors, sparsity: float) -> int:
    return math.floor(sparsity * sum(w.numel() for w in weights.values()) + 0.5)


def selected(report: Report) -> list[tuple[str, Any]]:
    return [(c["role"], c["parameters"].get("lam")) for c in report.candidates if c["selected"]]


# What is on disk


def test_saved_sparsity_is_exact_and_as_reported(
    structure: str, runs: Callable[[str], tuple[Path, Report]], read: Read, linears: Linears
) -> None:
    out, report = runs(structure)
    saved = read(out)
    names = {f"{n}.weight" for n in linears(tiny_model(structure))}
    weights = {n: saved[n] for n in names}
    count, total = zeros(weights), sum(w.numel() for w in weights.values())
    assert count == wanted_zeros(weights, 0.6)
    assert report.counts == report.counts | {
        "pruned": count,
        "weights": total,
        "linears": len(names),
    }
    achieved = dict.fromkeys(("achieved", "over_pruned", "over_all"), count / total)
    assert report.sparsity == {"wanted": 0.6, **achieved}
    assert report.linears.keys() == {n.removesuffix(".weight") for n in names}
    for name, linear in report.linears.items():
        zero = (weights[f"{name}.weight"] == 0).double()
        assert linear["achieved"] == pytest.approx(zero.mean().item(), abs=1e-12)
        rows = zero.mean(dim=1)
        found = [float(rows.min()), float(rows.mean()), float(rows.max())]
        assert list(linear["rows"].values()) == pytest.approx(found, abs=1e-12)
        # A count is its ratio's share rounded: within one weight of it.
        assert abs(linear["achieved"] - linear["wanted"]) * zero.numel() <= 1
        assert linear["tensors"] == [f"{name}.weight"]


def test_reported_ratios_add_up(structure: str, runs: Callable[[str], tuple[Path, Report]]) -> None:
    _, report = runs(structure)
    layout = find(tiny_model(structure))
    assert [b["name"] for b in report.blocks] == [b.name for b in layout.blocks]
    for key, whole in (("achieved", report.counts["pruned"]), ("wanted", 0.6 * layout.weights)):
        by_linear = {n: report.linears[n][key] * x.weights for n, x in layout.linears.items()}
        assert sum(by_linear.values()) == pytest.approx(whole, abs=0.5)
        for block, entry in zip(layout.blocks, report.blocks, strict=True):
            total = sum(by_linear[x.name] for x in block.linears)
            assert entry[key] * block.weights == pytest.approx(total)


def test_everything_else_is_dense_to_the_byte(
    structure: str,
    runs: Callable[[str], tuple[Path, Report]],
    models: Mapping[str, Path],
    read: Read,
    linears: Linears,
) -> None:
    dense, pruned = read(models[structure]), read(runs(structure)[0])
    prunable = {f"{n}.weight" for n in linears(tiny_model(structure))}
    assert dense.keys() == pruned.keys()
    assert prunable < dense.keys()
    for name, tensor in dense.items():
        if name in prunable:  # what survives is what it was
            assert torch.equal(pruned[name], tensor.masked_fill(pruned[name] == 0, 0))
        else:
            assert torch.equal(pruned[name], tensor), name


def test_folder_is_an_ordinary_checkpoint(
    structure: str,
    runs: Callable[[str], tuple[Path, Report]],
    recipe: Recipe,
    windows: Tensor,
    weights_of: Callable[[nn.Module], Tensors],
    same: Callable[[Tensors, Tensors], bool],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, by_path = runs(structure)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    model = tiny_model(structure)
    in_memory = neuroal.prune(model, None, recipe, windows=windows)
    assert same(weights_of(loaded), weights_of(model))
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, model(windows).logits)
    assert in_memory.candidates == by_path.candidates
    assert in_memory.sparsity == by_path.sparsity
    for name, linear in in_memory.linears.items():
        assert linear | {"tensors": None} == by_path.linears[name] | {"tensors": None}
    tokens = AutoTokenizer.from_pretrained(out)("Once.", return_tensors="pt")
    text = loaded.generate(**tokens, max_new_tokens=4, do_sample=False)
    assert text.shape == (1, 9)


def test_files_of_a_run(
    runs: Callable[[str], tuple[Path, Report]], models: Mapping[str, Path]
) -> None:
    out, _ = runs("llama")
    assert {f.name for f in out.iterdir()} == {
        *(f.name for f in models["llama"].iterdir()),
        *("README.md", "allocation.safetensors", "neuroal.json"),
    }
    assert [f.name for f in out.parent.iterdir() if "llama" in f.name] == ["llama"]
    assert "sparsity_config" not in (out / "config.json").read_text()
    assert "quantization_config" not in (out / "config.json").read_text()
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "\n# llama, pruned to 60.0%\n" in card
    assert "60.0%" in card and "wanda" in card
    assert "no faster in a runtime that does not use sparsity, and `neuroal pack`" in card


def test_patterns_of_blocks_are_said_where_they_vary(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path
) -> None:
    changes = {"pattern": "2:4", "top_up": "uniform", "options": {}}
    recipe = dataclasses.replace(from_file, model=str(models["llama"]), **changes)
    report = neuroal.prune(
        models["llama"], recipe=dataclasses.replace(recipe, sparsity=0.6), out=tmp_path / "out"
    )
    note = "N varies to meet the sparsity: of 3 blocks, 2:4 in 2, 1:4 in 1"
    assert report.notes == [note]
    assert [b["achieved"] for b in report.blocks] == pytest.approx([0.75, 0.5, 0.5])
    assert f"- {note}\n" in (tmp_path / "out" / "README.md").read_text()
    own = dataclasses.replace(recipe, sparsity=None)
    assert neuroal.prune(models["llama"], recipe=own, out=tmp_path / "own").notes == []


def test_what_a_pattern_leaves_dense_is_said(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path
) -> None:
    changes = {"pattern": "1:3", "skip_indivisible": True, "top_up": "uniform", "options": {}}
    recipe = dataclasses.replace(from_file, model=str(models["llama"]), sparsity=None, **changes)
    note = (
        "stays dense: pattern 1:3 does not divide the inputs: model.layers.0.self_attn.q_proj and "
        "17 more, 82.4% of the weights of all linears"
    )
    assert note in plan(prepare(recipe)).to_json()["notes"]
    report = neuroal.prune(models["llama"], recipe=recipe, out=tmp_path / "out")
    assert note in report.notes
    from transformers import AutoModelForCausalLM

    zeros = 3 * 32 * 48 * 2 // 3  # two of three inputs of three down projections
    assert (report.counts["pruned"], report.counts["weights"]) == (zeros, 3 * 32 * 48)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    linears = find(saved).linears
    found = sum(int((saved.get_submodule(n).weight == 0).sum()) for n in linears)
    assert found == zeros
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- {note}\n" in card
    assert "Of the prunable weights inside the decoder blocks, 3,072 of\n4,608 are zero" in card


def test_neuroal_json(
    runs: Callable[[str], tuple[Path, Report]], models: Mapping[str, Path], from_file: Recipe
) -> None:
    out, report = runs("llama")
    data = json.loads((out / "neuroal.json").read_text())
    assert data == json.loads(json.dumps(report.to_json()))
    assert data.keys() >= KEYS
    assert data["schema"] == 1
    assert data["recipe"] == json.loads(
        json.dumps(dataclasses.replace(from_file, model=str(models["llama"])).to_json())
    )
    roles = [(p["role"], p["name"]) for p in data["plugins"]]
    assert roles == [
        ("pruner", "wanda"),
        ("block_ratios", "linear_schedule"),
        ("row_ratios", "neuroal"),
        ("alignment", "neuron"),
    ]
    for plugin in data["plugins"]:
        assert plugin.keys() == {"role", "name", "distribution", "version", "options", "sha256"}
        assert plugin["distribution"] == "neuroal" and len(plugin["sha256"]) == 64
    assert data["plugins"][1]["options"] == {"lambdas": [0.05, 0.1]}
    assert {k: data["data"][k] for k in ("source", "windows", "length")} == {
        "source": from_file.calibration,
        "windows": 6,
        "length": 16,
    }
    assert len(data["data"]["sha256"]) == 64 and len(data["model"]["sha256"]) == 64
    for candidate in data["candidates"]:
        needed = {"role", "plugin", "parameters", "misalignment", "selected", "dropped"}
        assert candidate.keys() >= needed
        assert candidate["misalignment"] > 0 and candidate["dropped"] is False
    lams = [(c["role"], c["parameters"]["lam"]) for c in data["candidates"]]
    assert lams == [
        *(("block_ratios", 0.05), ("block_ratios", 0.1)),
        *(("row_ratios", 0.0), ("row_ratios", 0.1)),
    ]
    for role in ("block_ratios", "row_ratios"):
        step = [c for c in data["candidates"] if c["role"] == role]
        best = min(step, key=lambda c: float(c["misalignment"]))
        assert [c for c in step if c["selected"]] == [best]
    assert data["timings"].keys() >= {"load", "calibrate", "block_search", "row_search", "prune"}
    assert all(t >= 0 for t in data["timings"].values())
    assert data["peak_memory_bytes"] > 1 << 20
    assert data["phase_memory_bytes"].keys() == data["timings"].keys()
    memory = [data["phase_memory_bytes"][k] for k in (*report.timings,)]
    assert memory == sorted(memory) and memory[-1] == data["peak_memory_bytes"]
    versions = data["environment"]
    assert versions["torch"] == torch.__version__ and versions["dtype"] == "float32"


# What is pruned


def input_norms(model: nn.Module, names: Sequence[str], ids: Tensor) -> Tensors:
    """sqrt(mean over windows of the summed squares) of linears' inputs, by one forward pass."""
    norms: Tensors = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].flatten(end_dim=-2).double()  # opt's MLP has no dimension of windows
        norms[name] = x.square().sum(dim=0).div(len(ids)).sqrt()

    modules = [model.get_submodule(n) for n in names]
    handles = [
        m.register_forward_pre_hook(partial(keep, n)) for n, m in zip(names, modules, strict=True)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return norms


def slow_wanda(model: nn.Module, ids: Tensor, ratio: float) -> Tensors:
    """Wanda, |W| times input norm, block after block on the inputs that the pruned ones produce."""
    weights = dict(model.named_parameters())
    for block in find(model).blocks:
        norms = input_norms(model, [x.name for x in block.linears], ids)
        for name, norm in norms.items():
            weight = weights[f"{name}.weight"].detach()
            order = (weight.double().abs() * norm).argsort(dim=1)
            weight.scatter_(1, order[:, : round(ratio * weight.shape[1])], 0.0)
    return {n: weights[f"{n}.weight"].detach() for n in find(model).linears}


def test_pruned_as_by_whole_forward_passes(
    structure: str, recipe: Recipe, windows: Tensor, linears: Linears
) -> None:
    # 0.5 of 32 and of 48 inputs are whole numbers: every row prunes exactly half.
    model = tiny_model(structure)
    neuroal.prune(
        model,
        None,
        dataclasses.replace(recipe, sparsity=0.5, top_up="uniform", options={}),
        windows=windows,
    )
    expected = slow_wanda(tiny_model(structure), windows, 0.5)
    found = linears(model)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_recorded_input_norms_are_those_of_whole_forward_passes(
    structure: str, pruner: str, recipe: Recipe, windows: Tensor, linears: Linears
) -> None:
    model = tiny_model(structure)
    asked = dataclasses.replace(recipe, pruner=pruner, top_up="uniform", options={})
    report = neuroal.prune(model, None, asked, windows=windows)
    pruned, partly = linears(model), tiny_model(structure)
    blocks = find(model).blocks
    for block in blocks:
        names = [x.name for x in block.linears]
        norms = {"dense": input_norms(partly, names, windows)}
        with torch.no_grad():
            for name in names:
                partly.get_submodule(name).weight.copy_(pruned[name])  # type: ignore[operator]
        norms["pruned"] = input_norms(partly, names, windows)
        for name in names:
            recorded = report.linears[name]["input_norm"]
            expected = {key: float(norms[key][name].mean()) for key in norms}
            if block is blocks[-1]:
                assert recorded.pop("pruned") is None and expected.pop("pruned")
            assert recorded == pytest.approx(expected, rel=1e-5), name


def test_no_input_norms_where_the_final_pruning_runs_no_block(
    recipe: Recipe, windows: Tensor
) -> None:
    asked = dataclasses.replace(recipe, pruner="magnitude", top_up="uniform", options={})
    report = neuroal.prune(tiny_model("llama"), None, asked, windows=windows)
    assert not any("input_norm" in x for x in report.linears.values())


def test_a_pruner_reads_no_statistic_that_only_the_report_records(
    recipe: Recipe, windows: Tensor
) -> None:
    @dataclass(frozen=True, eq=False)
    class Sums:
        """Asks for one statistic and looks for another."""

        @hookimpl
        def required_statistics(self) -> set[str]:
            return {"input_sum"}

        @hookimpl
        def score_weights(self, weight: Tensor, statistics: Any) -> Tensor:
            assert "input_sum" in statistics and "input_norm" not in statistics
            return weight.abs()

    asked = dataclasses.replace(recipe, pruner=Sums(), top_up="uniform", options={})
    report = neuroal.prune(tiny_model("llama"), None, asked, windows=windows)
    assert all("input_norm" in x for x in report.linears.values())


def test_committed_walk_ends_in_the_models_own_output(
    structure: str, recipe: Recipe, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[CandidateState] = []
    run = Walker.run

    def spy(self: Walker, *args: Any, **how: Any) -> Any:
        result = run(self, *args, **how)
        if result.state is not None and not how.get("weights"):
            passed.append(result.state)
        return result

    monkeypatch.setattr(Walker, "run", spy)
    model = tiny_model(structure)
    neuroal.prune(model, None, recipe, windows=windows)
    monkeypatch.undo()
    # The engine's last pass through a committed block is the last but one; the last is run here.
    walker = Walker(model, find(model))
    inputs = walker.inputs(windows)
    last = walker.layout.blocks[-1]
    with walker.block(last) as module:
        behind = walker.run(last, module, inputs, passed[-1]).state
    assert behind is not None
    logits = [
        walker.logits(batch, outputs)
        for batch, outputs in zip(inputs.batches, behind.outputs, strict=True)
    ]
    with torch.no_grad():
        expected = model(windows).logits
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("top_up", ["uniform", "neuroal"])
def test_any_sparsity_is_met_to_the_weight(
    sparsity: float, top_up: str, recipe: Recipe, windows: Tensor, linears: Linears
) -> None:
    model = tiny_model("mistral")
    options = recipe.options if top_up == "neuroal" else {}
    asked = dataclasses.replace(recipe, sparsity=sparsity, top_up=top_up, options=options)
    report = neuroal.prune(model, None, asked, windows=windows)
    weights = linears(model)
    assert zeros(weights) == wanted_zeros(weights, sparsity) == report.counts["pruned"]


@pytest.mark.parametrize("comparison", ["row", "matrix"])
def test_rows_without_row_ratios_differ_by_at_most_one(
    comparison: Any, recipe: Recipe, windows: Tensor, linears: Linears
) -> None:
    model = tiny_model("llama")
    asked = dataclasses.replace(recipe, top_up="uniform", options={}, comparison=comparison)
    neuroal.prune(model, None, asked, windows=windows)
    spread = [
        int((w == 0).sum(dim=1).max() - (w == 0).sum(dim=1).min()) for w in linears(model).values()
    ]
    assert (max(spread) <= 1) == (comparison == "row")


def test_row_ratios_reach_the_rows(recipe: Recipe, windows: Tensor) -> None:
    model = tiny_model("llama")
    options = dict(recipe.options) | {"neuroal": {"lambdas": [0.25]}}
    asked = dataclasses.replace(
        recipe, top_up="neuroal-row", options={"neuroal": options["neuroal"]}
    )
    report = neuroal.prune(model, None, asked, windows=windows)
    spread = {n: x["rows"]["max"] - x["rows"]["min"] for n, x in report.linears.items()}
    blocks = {n: n.split(".layers.")[1][0] for n in spread}
    assert max(spread[n] for n in spread if blocks[n] == "0") > 0.3
    assert max(spread[n] for n in spread if blocks[n] == "2") < 0.04  # the last has no consumer
    assert report.counts["pruned"] == round(0.6 * report.counts["weights"])


def test_refiner_exchanges_weights_and_keeps_the_budget(
    recipe: Recipe, windows: Tensor, linears: Linears
) -> None:
    plain, refined = tiny_model("llama"), tiny_model("llama")
    neuroal.prune(plain, None, recipe, windows=windows)
    report = neuroal.prune(
        refined, None, dataclasses.replace(recipe, refiner=Swap()), windows=windows
    )
    before, after = linears(plain), linears(refined)
    assert zeros(after) == wanted_zeros(after, 0.6)
    assert report.plugins[-1]["name"] == "swap" and report.plugins[-1]["role"] == "refiner"
    dense = linears(tiny_model("llama"))
    first = "model.layers.0.self_attn.q_proj"
    assert int(((before[first] == 0) != (after[first] == 0)).sum()) == 2 * len(dense[first])
    kept = after[first] != 0  # what comes back has its dense value
    assert torch.equal(after[first][kept], dense[first][kept])


@dataclasses.dataclass(frozen=True, eq=False)
class Swap:
    """In every row the first pruned weight comes back and the first kept one goes."""

    @hookimpl
    def refine_mask(self, mask: Tensor) -> Tensor:
        new = mask.clone()
        rows = torch.arange(len(mask))
        new[rows, mask.int().argmax(dim=1)] = False
        new[rows, (~mask).int().argmax(dim=1)] = True
        return new


# Dtypes, tied weights, runs without data


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(
    dtype: torch.dtype,
    structure: str,
    save: Callable[[nn.Module, Path], Path],
    from_file: Recipe,
    tmp_path: Path,
    read: Read,
    linears: Linears,
) -> None:
    dense = tiny_model(structure).to(dtype)
    folder = save(dense, tmp_path / "model")
    report = neuroal.prune(folder, recipe=from_file, out=tmp_path / "out")
    saved, original = read(tmp_path / "out"), read(folder)
    assert {t.dtype for t in saved.values()} == {dtype}
    weights = {n: saved[f"{n}.weight"] for n in linears(dense)}
    already = zeros({n: original[f"{n}.weight"] for n in weights})  # rounded to zero
    assert abs(zeros(weights) - wanted_zeros(weights, 0.6)) <= already
    assert report.counts["pruned"] == zeros(weights)
    for name, tensor in original.items():
        kept = saved[name] != 0 if name.removesuffix(".weight") in weights else tensor == tensor
        assert torch.equal(saved[name][kept], tensor[kept]), name
    assert report.environment["dtype"] == str(dtype).removeprefix("torch.")


def test_dtype_of_the_recipe(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, read: Read
) -> None:
    asked = dataclasses.replace(from_file, dtype="bfloat16")
    neuroal.prune(models["llama"], recipe=asked, out=tmp_path / "out")
    assert {t.dtype for t in read(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tied_embeddings_stay_tied(runs: Callable[[str], tuple[Path, Report]], read: Read) -> None:
    from transformers import AutoModelForCausalLM

    out, _ = runs("opt")
    assert "lm_head.weight" not in read(out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight is loaded.model.decoder.embed_tokens.weight
    assert int((loaded.lm_head.weight == 0).sum()) == 0


def test_without_data_no_block_runs(
    models: Mapping[str, Path], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **how: Any) -> None:
        raise AssertionError("a block was run")

    monkeypatch.setattr(Walker, "run", never)
    monkeypatch.setattr(Walker, "inputs", never)
    asked = dataclasses.replace(recipe, pruner="magnitude", top_up="uniform", options={})
    report = neuroal.prune(models["phi"], recipe=asked, out=tmp_path / "out")
    assert report.data is None and report.counts["block_runs"] == 0
    assert report.sparsity["achieved"] == pytest.approx(0.6, abs=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "calibration: none" in card


def test_recipe_in_the_place_of_the_tokenizer(recipe: Recipe, windows: Tensor) -> None:
    with pytest.raises(neuroal.UsageError, match="recipe="):
        neuroal.prune(tiny_model("llama"), recipe, windows=windows)


def test_by_path_needs_an_output_folder(models: Mapping[str, Path], from_file: Recipe) -> None:
    with pytest.raises(neuroal.UsageError, match="output folder"):
        neuroal.prune(models["llama"], recipe=from_file)


def test_in_memory_can_be_saved_with_its_tokenizer(
    recipe: Recipe, windows: Tensor, tmp_path: Path, weights_of: Any, same: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model("phi")
    report = neuroal.prune(
        model, tiny_tokenizer(), recipe, windows=windows, out=tmp_path / "a" / "out"
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "out")
    assert same(weights_of(loaded), weights_of(model))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a" / "out")) == 97
    assert json.loads((tmp_path / "a" / "out" / "neuroal.json").read_text()) == json.loads(
        json.dumps(report.to_json())
    )


def test_text_calibrates_a_model_in_memory(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 20)
    asked = dataclasses.replace(recipe, calibration=str(file), length=16)
    report = neuroal.prune(tiny_model("llama"), tiny_tokenizer(), asked)
    assert report.data is not None
    assert (report.data["windows"], report.data["length"]) == (6, 16)


def test_model_in_memory_keeps_its_mode(recipe: Recipe, windows: Tensor) -> None:
    model = tiny_model("llama").train()
    neuroal.prune(model, None, recipe, windows=windows)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
