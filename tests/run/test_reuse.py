"""An earlier allocation is used as far as the run can have it; the rest is refused or named."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import neuroal
from neuroal import Importance, NeuroalError, Recipe, UsageError
from neuroal.cost.plan import plan
from neuroal.cost.preparation import prepare
from neuroal.layout import Layout, find
from neuroal.pruning.allocation import Allocation, read, to_bytes
from neuroal.testing import tiny_model

BY_MATRIX = {"pruner": "magnitude", "options": {"magnitude": {"comparison": "matrix"}}}
VARIES = {"pruner": "magnitude", "pattern": "2:4", "sparsity": 0.4}
PATTERN = "pattern 2:4 fixes the ratio of every row"
LEFT_OUT: list[tuple[str, dict[str, Any], str]] = [
    ("ratios", VARIES, PATTERN),
    ("ratios", {"pruner": "sparsegpt"}, "the mask of pruner 'sparsegpt' is not per row"),
    ("ratios", BY_MATRIX, "weights compete over the whole matrix, not within rows"),
    ("importance", VARIES, PATTERN),
]
REFUSED = [
    ("ratios", "matrix", "weights compete over the whole matrix, not within rows"),
    ("importance", "row", "--comparison row keeps them from it"),
]
USED: list[tuple[str, dict[str, Any]]] = [
    ("ratios", {"pruner": "magnitude"}),
    ("importance", {"pruner": "magnitude"}),
    ("importance", {"pruner": "magnitude", "comparison": "matrix"}),
    ("importance", {"pruner": "sparsegpt"}),
    ("inputs", {"pruner": "magnitude"}),
    ("numbers", {"pruner": "magnitude", "comparison": "matrix"}),
]


@pytest.fixture(scope="module")
def found() -> Layout:
    return find(tiny_model("mistral"))


@pytest.fixture
def earlier(tmp_path: Path, found: Layout) -> dict[str, Path]:
    """Allocations of the same ratios of linears, with rows on top, and with rows and inputs."""
    rng = torch.Generator().manual_seed(0)
    numbers = {n: 0.4 + 0.02 * k for k, n in enumerate(found.linears)}
    uneven = {
        n: torch.rand(x.out_features, generator=rng, dtype=torch.float64)
        for n, x in found.linears.items()
    }
    made = {
        "numbers": Allocation.of(numbers, found),
        "ratios": Allocation.of(
            {n: numbers[n] + 0.2 * (x - x.mean()) for n, x in uneven.items()}, found
        ),
        "importance": Allocation.of(
            numbers, found, {n: Importance(x + 0.1) for n, x in uneven.items()}
        ),
    }
    inputs = {
        n: torch.rand(x.in_features, generator=rng, dtype=torch.float64) + 0.1
        for n, x in found.linears.items()
    }
    made["inputs"] = Allocation.of(
        numbers, found, {n: Importance(x + 0.1, inputs[n]) for n, x in uneven.items()}
    )
    for name, allocation in made.items():
        (tmp_path / name).write_bytes(to_bytes(allocation, found))
    return {name: tmp_path / name for name in made}


def said(notes: Any) -> list[str]:
    return [n for n in notes if " of rows in allocation " in n]


@pytest.mark.parametrize(("what", "choice", "why"), LEFT_OUT)
def test_rows_that_cannot_be_are_left_out_and_named(
    what: str,
    choice: dict[str, Any],
    why: str,
    earlier: Mapping[str, Path],
    found: Layout,
    models: Mapping[str, Path],
    from_file: Recipe,
    digests: Any,
    tmp_path: Path,
) -> None:
    """The run is that of the linears' ratios alone, and its own allocation says no more."""
    recipe = dataclasses.replace(from_file, **({"options": {}} | choice))
    outs = {}
    for name in ("numbers", what):
        asked = dataclasses.replace(recipe, allocation=str(earlier[name]))
        outs[name] = tmp_path / f"out-{name}"
        report = neuroal.prune(models["mistral"], recipe=asked, out=outs[name])
        note = f"{name} of rows in allocation '{earlier[name]}' left out: {why}"
        assert said(report.notes) == ([note] if name == what else [])
        told = plan(prepare(dataclasses.replace(asked, model=str(models["mistral"]))))
        assert said(told.notes) == said(report.notes)
    pruned = [digests(out)["model.safetensors"] for out in outs.values()]
    assert pruned[0] == pruned[1]
    kept = read(outs[what], found)
    assert kept.rows == {} and kept.importance == {}


@pytest.mark.parametrize(("what", "comparison", "why"), REFUSED)
def test_rows_that_a_flag_alone_forbids_are_refused(
    what: str,
    comparison: Any,
    why: str,
    earlier: Mapping[str, Path],
    models: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    path, out = earlier[what], tmp_path / "out"
    recipe = Recipe(
        sparsity=0.5,
        pruner="magnitude",
        comparison=comparison,
        allocation=str(path),
        device="cpu",
    )
    line = f"{what} of rows in allocation '{path}' cannot be used here: .*{why}: drop --comparison"
    with pytest.raises(UsageError, match=line):
        neuroal.prune(models["mistral"], recipe=recipe, out=out)
    with pytest.raises(UsageError, match=line):
        prepare(dataclasses.replace(recipe, model=str(models["mistral"])))
    assert not out.exists()


@pytest.mark.parametrize(("what", "choice"), USED)
def test_rows_that_can_be_are_used(
    what: str,
    choice: dict[str, Any],
    earlier: Mapping[str, Path],
    found: Layout,
    models: Mapping[str, Path],
    from_file: Recipe,
    tmp_path: Path,
) -> None:
    given = {"options": {}, "allocation": str(earlier[what])} | choice
    asked = dataclasses.replace(from_file, **given)
    report = neuroal.prune(models["mistral"], recipe=asked, out=tmp_path / "out")
    assert said(report.notes) == []
    again = read(tmp_path / "out", found)
    assert bool(again.rows) == (what == "ratios")
    assert bool(again.importance) == (what in ("importance", "inputs"))
    of_inputs = [x.inputs is not None for x in again.importance.values()]
    assert any(of_inputs) == all(of_inputs) == (what == "inputs") or not of_inputs


def test_importance_of_inputs_is_left_out_under_a_pruner_that_moves_weights(
    earlier: Mapping[str, Path],
    found: Layout,
    models: Mapping[str, Path],
    from_file: Recipe,
    digests: Any,
    tmp_path: Path,
) -> None:
    """What is left is the allocation with the rows alone."""
    weights = []
    for what in ("importance", "inputs"):
        asked = dataclasses.replace(
            from_file, options={}, pruner="sparsegpt", allocation=str(earlier[what])
        )
        out = tmp_path / f"out-{what}"
        report = neuroal.prune(models["mistral"], recipe=asked, out=out)
        note = (
            f"importance of inputs in allocation '{earlier[what]}' left out: pruner 'sparsegpt' "
            "moves weights"
        )
        assert (note in report.notes) == (what == "inputs")
        again = read(out, found)
        assert again.importance and all(x.inputs is None for x in again.importance.values())
        weights.append(digests(out)["model.safetensors"])
    assert weights[0] == weights[1]


def test_a_dry_run_reads_the_allocation(models: Mapping[str, Path], tmp_path: Path) -> None:
    asked = Recipe(model=str(models["mistral"]), allocation=str(tmp_path / "none"))
    with pytest.raises(NeuroalError, match="none"):
        prepare(asked)
