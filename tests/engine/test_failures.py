"""What goes wrong ends in one line, with the model as it was and nothing on disk."""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuroal
from neuroal import (
    Generation,
    Layout,
    Linear,
    Measurement,
    NeuroalError,
    PluginError,
    Proposal,
    PrunedLinear,
    Recipe,
    UsageError,
    hookimpl,
)
from neuroal.testing import tiny_model

WeightsOf = Callable[[nn.Module], dict[str, Tensor]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Tree = Callable[[], dict[str, str]]


@dataclass(frozen=True, eq=False)
class Broken:
    """Fails in one way, from one linear on."""

    how: str = "raise"
    linear: str = ""

    @hookimpl
    def score_weights(self, weight: Tensor, linear: Linear) -> Any:
        if self.linear not in linear.name:
            return weight.abs()
        if self.how == "raise":
            raise ValueError("first line\nsecond line")
        if self.how == "exit":
            raise SystemExit(3)
        if self.how == "memory":
            raise MemoryError("too large")
        if self.how == "write":
            return weight.zero_()
        answers = {
            "shape": weight[:-1],
            "nan": weight.abs().log(),  # -inf where a weight is zero
            "dtype": weight.int(),
            "list": [1.0],
            "none": None,
        }
        if self.how == "nan":
            return torch.full_like(weight, torch.nan)
        return answers[self.how]


@dataclass(frozen=True, eq=False)
class MovesTooFew:
    """Answers with a mask that misses its target."""

    @hookimpl
    def prune_linear(self, weight: Tensor) -> PrunedLinear:
        return PrunedLinear(weight.clone(), torch.zeros_like(weight, dtype=torch.bool))


@dataclass(frozen=True, eq=False)
class BrokenRefiner:
    """Fails in the final pruning alone, in a block."""

    linear: str = ""
    how: str = "raise"

    @hookimpl
    def refine_mask(self, mask: Tensor, linear: Linear) -> Tensor:
        if self.linear in linear.name:
            if self.how == "raise":
                raise RuntimeError("no")
            return mask[:-1] if self.how == "shape" else ~mask
        return mask


@dataclass(frozen=True, eq=False)
class BrokenAlignment:
    """Answers with one number."""

    value: str = "nan"

    @hookimpl
    def required_statistics(self) -> set[str]:
        return {"input_norm"}

    @hookimpl
    def measure_linear(self) -> Tensor:
        return torch.tensor(float(self.value))


@dataclass(frozen=True, eq=False)
class BrokenRatios:
    """Proposes what cannot be."""

    how: str = "outside"

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout
    ) -> Generator[Generation, list[Measurement], Proposal | None]:
        good = dict.fromkeys(layout.linears, 0.6)
        first = next(iter(good))
        bad: dict[str, dict[str, Any]] = {
            "outside": good | {first: 1.5},
            "nan": good | {first: float("nan")},
            "missing": {k: v for k, v in good.items() if k != first},
            "unknown": good | {"lm_head": 0.1},
            "shape": good | {first: torch.full((3,), 0.6)},
        }
        if self.how == "raise":
            yield Generation([Proposal(good)])
            raise ZeroDivisionError("after the first generation")
        if self.how == "nothing":
            yield Generation([Proposal(good)], probe=True)
            return None
        yield Generation([Proposal(bad[self.how])])
        return None


def one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "raises": ({"pruner": Broken()}, ("broken", "score_weights", "ValueError: first line")),
    "exits": ({"pruner": Broken("exit")}, ("broken", "score_weights", "SystemExit")),
    "shape": ({"pruner": Broken("shape")}, ("broken", "score_weights", "(31, 32), not (32, 32)")),
    "nan": ({"pruner": Broken("nan")}, ("score_weights", "NaN or infinity", "q_proj")),
    "dtype": ({"pruner": Broken("dtype")}, ("score_weights", "int32", "floating")),
    "list": ({"pruner": Broken("list")}, ("score_weights", "list")),
    "none": ({"pruner": Broken("none")}, ("score_weights", "None")),
    "write": ({"pruner": Broken("write")}, ("score_weights", "wrote to its input 'weight'")),
    "late": ({"pruner": Broken("nan", "layers.2.mlp")}, ("score_weights", "layers.2.mlp")),
    "late in pruning": (
        {"pruner": Broken("raise", "layers.1.mlp"), "top_up": "uniform"},
        ("broken", "score_weights"),
    ),
    "mask": ({"pruner": MovesTooFew()}, ("prune_linear", "pruned 0, not")),
    "refiner": ({"refiner": BrokenRefiner()}, ("refine_mask", "RuntimeError: no")),
    "refiner late": ({"refiner": BrokenRefiner("layers.2")}, ("refine_mask", "RuntimeError: no")),
    "refiner shape": ({"refiner": BrokenRefiner(how="shape")}, ("refine_mask", "mask")),
    "refiner count": ({"refiner": BrokenRefiner(how="invert")}, ("refine_mask", "pruned")),
    **{
        f"metric {value}": ({"alignment": BrokenAlignment(value)}, ("broken_alignment", "NaN, inf"))
        for value in ("nan", "inf", "-1")
    },
    **{
        f"ratios {how}": ({"block_ratios": BrokenRatios(how)}, ("broken_ratios", part))
        for how, part in (
            ("outside", "not in [0, 1]"),
            ("nan", "not in [0, 1]"),
            ("missing", "differ in linear"),
            ("unknown", "differ in linear 'lm_head'"),
            ("shape", "(3,)"),
            ("raise", "ZeroDivisionError: after the first generation"),
            ("nothing", "without a proposal that can win"),
        )
    },
}
IN_THE_FINAL_PRUNING = {"late in pruning", "mask"} | {c for c in CASES if c.startswith("refiner")}


@pytest.mark.parametrize("case", CASES)
def test_broken_plugin(
    case: str,
    recipe: Recipe,
    windows: Tensor,
    tmp_path: Path,
    tree: Tree,
    weights_of: WeightsOf,
    same: Same,
) -> None:
    changes, parts = CASES[case]
    unused = {"linear_schedule"} if "block_ratios" in changes else set()
    if "top_up" in changes:
        unused = set(recipe.options)
    options = {k: v for k, v in recipe.options.items() if k not in unused}
    model = tiny_model("llama")
    before = weights_of(model)
    asked = dataclasses.replace(recipe, options=options, **changes)
    with pytest.raises(PluginError) as error:
        neuroal.prune(model, None, asked, windows=windows, out=tmp_path / "out")
    one_line(error, *parts)
    assert tree() == {}
    if case not in IN_THE_FINAL_PRUNING:
        assert same(weights_of(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all("forward" not in vars(m) for m in model.modules())


def test_final_pruning_ends_at_a_block(
    recipe: Recipe, windows: Tensor, weights_of: WeightsOf
) -> None:
    """A failure there leaves whole blocks: pruned before the one that failed, dense from it on."""
    model = tiny_model("llama")
    before = weights_of(model)
    asked = dataclasses.replace(recipe, refiner=BrokenRefiner("layers.1.mlp.down_proj"))
    with pytest.raises(PluginError):
        neuroal.prune(model, None, asked, windows=windows)
    changed = {n for n, t in weights_of(model).items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if "layers.0." in n and "proj" in n}


def test_model_can_be_pruned_after_a_failure(
    recipe: Recipe, windows: Tensor, weights_of: WeightsOf, same: Same
) -> None:
    model, fresh = tiny_model("opt"), tiny_model("opt")
    with pytest.raises(PluginError):
        neuroal.prune(
            model, None, dataclasses.replace(recipe, pruner=Broken(linear="fc2")), windows=windows
        )
    one = neuroal.prune(model, None, recipe, windows=windows)
    other = neuroal.prune(fresh, None, recipe, windows=windows)
    assert same(weights_of(model), weights_of(fresh))
    assert one.candidates == other.candidates


def test_lack_of_memory_leaves_the_finished_steps(
    recipe: Recipe, windows: Tensor, tmp_path: Path
) -> None:
    asked = dataclasses.replace(
        recipe, pruner=Broken("memory", "layers.1.mlp"), top_up="uniform", options={}
    )
    with pytest.raises(PluginError, match="MemoryError: too large"):
        neuroal.prune(tiny_model("llama"), None, asked, windows=windows, out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    steps = [p.name for p in (tmp_path / "out.partial" / "journal").iterdir()]
    assert sorted(steps) == ["block-0000.safetensors", "kept.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_with_nan(
    value: float,
    save: Callable[[nn.Module, Path], Path],
    from_file: Recipe,
    recipe: Recipe,
    windows: Tensor,
    tmp_path: Path,
    tree: Tree,
) -> None:
    model = tiny_model("phi")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.fc1").weight[3, 4] = value  # type: ignore[operator]
    folder = save(model, tmp_path / "model")
    before = tree()
    for one, how in ((folder, from_file), (model, recipe)):
        given = {"windows": windows} if how is recipe else {}
        with pytest.raises(NeuroalError, match="NaN or infinity") as error:
            neuroal.prune(one, None, how, out=tmp_path / "out", **given)  # type: ignore[arg-type]
        one_line(error, "model.layers.1.mlp.fc1")
    assert tree() == before


WINDOWS: dict[str, tuple[Tensor, str]] = {
    "float": (torch.zeros(2, 8), "int64"),
    "one dimension": (torch.zeros(8, dtype=torch.int64), r"\(samples, length\)"),
    "none": (torch.zeros(0, 8, dtype=torch.int64), "0 windows"),
    "short": (torch.zeros(2, 1, dtype=torch.int64), "at least 2 tokens"),
    "long": (torch.zeros(2, 65, dtype=torch.int64), "context of 64 tokens"),
    "unknown token": (torch.full((2, 8), 97), "token id 97"),
    "negative token": (torch.full((2, 8), -1), "token id -1"),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_wrong_windows(case: str, recipe: Recipe, tmp_path: Path, tree: Tree) -> None:
    windows, message = WINDOWS[case]
    with pytest.raises(NeuroalError, match=message) as error:
        neuroal.prune(tiny_model("llama"), None, recipe, windows=windows, out=tmp_path / "out")
    one_line(error)
    assert tree() == {}


@pytest.mark.parametrize("change", [{"bos": "always"}, {"pack_documents": True}])
def test_given_windows_are_taken_as_they_are(
    change: dict[str, Any], recipe: Recipe, windows: Tensor, tmp_path: Path, tree: Tree
) -> None:
    asked = dataclasses.replace(recipe, **change)
    with pytest.raises(UsageError, match=f"taken as they are: {min(change)} is for") as error:
        neuroal.prune(tiny_model("llama"), None, asked, windows=windows, out=tmp_path / "out")
    one_line(error)
    assert tree() == {}


def test_missing_or_doubled_calibration(
    recipe: Recipe, from_file: Recipe, windows: Tensor, tmp_path: Path, tree: Tree
) -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="needs calibration") as error:
        neuroal.prune(model, None, recipe, out=tmp_path / "out")
    one_line(error, "wikitext2")
    with pytest.raises(UsageError, match="not both"):
        neuroal.prune(model, None, from_file, windows=windows, out=tmp_path / "out")
    wrong = dataclasses.replace(recipe, calibration=str(tmp_path / "missing.jsonl"))
    with pytest.raises(UsageError, match=r"missing\.jsonl"):
        neuroal.prune(model, None, wrong, out=tmp_path / "out")
    assert tree() == {}


def test_text_needs_a_tokenizer(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time. " * 50)
    asked = dataclasses.replace(recipe, calibration=str(tmp_path / "text.txt"), length=16)
    with pytest.raises(NeuroalError, match="no tokenizer"):
        neuroal.prune(tiny_model("llama"), None, asked)


NO_MODEL: dict[str, tuple[dict[str, str] | str | None, str]] = {
    "missing": (None, "neither a folder"),
    "file": ("no folder", "neither a folder"),
    "empty": ({}, r"no config\.json"),
    "config alone": ({"config.json": "{}"}, "cannot load model"),
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_no_model(case: str, from_file: Recipe, tmp_path: Path, tree: Tree) -> None:
    content, message = NO_MODEL[case]
    model = tmp_path / "model"
    if isinstance(content, str):
        model.write_text(content)
    elif content is not None:
        model.mkdir()
        for name, text in content.items():
            (model / name).write_text(text)
    before = tree()
    with pytest.raises(NeuroalError, match=message) as error:
        neuroal.prune(model, recipe=from_file, out=tmp_path / "out")
    one_line(error)
    assert tree() == before


def test_model_without_weights(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path, tree: Tree
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((models["llama"] / "config.json").read_bytes())
    before = tree()
    with pytest.raises(NeuroalError, match=r"no \.safetensors weights"):
        neuroal.prune(tmp_path / "model", recipe=from_file, out=tmp_path / "out")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(NeuroalError, match=r"cannot read '.*model\.safetensors'") as error:
        neuroal.prune(tmp_path / "model", recipe=from_file, out=tmp_path / "out")
    one_line(error)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert tree() == before


def test_missing_and_unexpected_weights(
    models: Mapping[str, Path], from_file: Recipe, tmp_path: Path
) -> None:
    """A checkpoint that lacks a tensor would be filled with random weights."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for file in models["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NeuroalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as error:
        neuroal.prune(folder, recipe=from_file, out=tmp_path / "out")
    one_line(error)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
