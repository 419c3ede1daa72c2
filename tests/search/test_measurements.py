"""Runs that share what they have in common give the same as runs alone, and cost less."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import neuroal
from neuroal import Recipe
from neuroal.data import calibration
from neuroal.search import measurements
from neuroal.search.measurements import SharedMeasurements
from neuroal.testing import tiny_model, tiny_tokenizer, windows

OWL = Recipe(sparsity=0.5, top_up="owl", samples=4, search_samples=2, calibration="rows.jsonl")


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"input_ids": row}) for row in windows(4, 16).tolist()]
    Path("rows.jsonl").write_text("\n".join(lines))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each thing that is made, in order."""
    made: list[str] = []

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*arguments: Any, **more: Any) -> Any:
            made.append(name)
            return function(*arguments, **more)

        monkeypatch.setattr(module, name, call)

    counted(calibration, "calibration_windows")
    counted(measurements, "measure_blocks")
    return made


def run(recipe: Recipe, together: SharedMeasurements | None) -> tuple[nn.Module, neuroal.Report]:
    model = tiny_model("llama")
    return model, neuroal.prune(model, tiny_tokenizer(), recipe, shared=together)


def plain(report: neuroal.Report) -> dict[str, Any]:
    """All that a report says but how long things took and how much memory they had."""
    return {
        key: value
        for key, value in report.to_json().items()
        if "memory" not in key and key != "timings"
    }


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
@pytest.mark.parametrize("sparsity", [0.4, 0.6])
def test_the_same_as_alone(
    pruner: str,
    sparsity: float,
    weights_of: Callable[[nn.Module], dict[str, Tensor]],
    same: Callable[[dict[str, Tensor], dict[str, Tensor]], bool],
) -> None:
    together = SharedMeasurements()
    first = run(OWL, together)[1]
    recipe = dataclasses.replace(OWL, pruner=pruner, sparsity=sparsity)
    model, report = run(recipe, together)
    alone, report_alone = run(recipe, None)
    assert same(weights_of(model), weights_of(alone))
    assert plain(report) == plain(report_alone)  # block runs too, though the walk was not repeated
    assert report.timings["measure"] == first.timings["measure"]


def test_made_once(calls: list[str]) -> None:
    together = SharedMeasurements()
    run(OWL, together)
    run(dataclasses.replace(OWL, sparsity=0.7, pruner="magnitude"), together)
    run(dataclasses.replace(OWL, top_up="uniform"), together)
    assert calls == ["calibration_windows", "measure_blocks"]
    run(dataclasses.replace(OWL, top_up="dlp"), together)  # asks something else of the same windows
    run(dataclasses.replace(OWL, options={"owl": {"M": 3.0}}), together)
    assert calls[2:] == ["measure_blocks", "measure_blocks"]
    run(dataclasses.replace(OWL, keep=("first:1",)), together)  # OWL sees other linears
    run(dataclasses.replace(OWL, keep=("first:1",), sparsity=0.6), together)
    assert calls[4:] == ["measure_blocks"]
    run(dataclasses.replace(OWL, samples=3), together)
    assert calls[5:] == ["calibration_windows", "measure_blocks"]
    # Cut otherwise, even where the windows then come out the same.
    run(dataclasses.replace(OWL, bos="never"), together)
    run(dataclasses.replace(OWL, pack_documents=False), together)
    assert calls[7:] == ["calibration_windows", "calibration_windows"]


def test_strategies_side_by_side_need_one_walk() -> None:
    both = dataclasses.replace(OWL, block_ratios=("owl", "dlp"))
    together = SharedMeasurements()
    run(OWL, together)
    run(dataclasses.replace(OWL, top_up="dlp"), together)
    assert plain(run(both, together)[1]) == plain(run(both, None)[1])
