"""The published procedure, written plainly in `benchmarks/`, and the engine find the same masks."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("speed")


def options(**more: Any) -> dict[str, Any]:
    given = {"model": "tiny", "threads": 1, "search": 2, "samples": 4, "length": 24}
    return {**given, "candidates": 3, **more}


def test_all_three_do_the_same_work(speed: ModuleType) -> None:
    with torch.no_grad():
        published, ours, floor = (
            speed.measure(what, options()) for what in ("published", "ours", "floor")
        )
    assert published["lam"] == ours["lam"]
    assert published["sha256"] == ours["sha256"]
    blocks, candidates, search, samples = 3, 3, 2, 4
    generation = search * (candidates * (2 * (blocks - 1) + 1) + 1)
    assert ours["block_runs"] == floor["block_runs"] == 2 * generation + samples * (2 * blocks - 1)
    assert published["block_runs"] == 2 * blocks * (2 * candidates * search + samples)


def test_ways_to_find_a_mask_agree(speed: ModuleType) -> None:
    (row,) = speed.masks(((6, 40),), 1)
    assert {k.split(",")[0] for k in row} > {"row_mask", "torch.sort", "torch.topk"}


def test_ways_to_prune_agree(speed: ModuleType) -> None:
    (row,) = speed.cuts(((6, 40),), 1)
    assert {k.split(",")[0] for k in row} == {"weight", "whole", "few rows"}


def test_grids_are_thinned_out(speed: ModuleType) -> None:
    block, row = speed.grids(None)
    assert len(block) == 14 and len(row) == 15
    assert [len(g) for g in speed.grids(2)] == [2, 2]


def test_results_compare_what_pruning_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    results = importlib.import_module("results")
    (tmp_path / "cases").mkdir()
    costs = {("", "", 0.0): 0.0, ("wanda", "uniform", 0.7): 0.4, ("wanda", "best", 0.7): 0.1}
    costs |= {("ria", "uniform", 0.6): 0.2, ("ria", "best", 0.6): 0.3}  # ratios 1/4 and 3/2
    for i, ((pruner, top_up, sparsity), cost) in enumerate(costs.items()):
        scores = {text: {"value": 20 * math.exp(cost)} for text in results.TEXTS}
        case = {"model": "llama", "pruner": pruner or None, "sparsity": sparsity}
        report = {"counts": {"block_runs": i}} if pruner else None
        content = {"status": "done", "case": {**case, "top_up": top_up or None}}
        content |= {"scores": scores, "report": report}
        (tmp_path / "cases" / f"{i}.json").write_text(json.dumps(content))
    known, runs = results.read_scores(tmp_path)
    found = results.ratios(known, "best", "uniform", "ptb")
    assert found == {
        ("llama", "wanda", 0.7): pytest.approx(1 / 4),
        ("llama", "ria", 0.6): pytest.approx(3 / 2),
    }
    assert results.geometric(found.values()) == pytest.approx(math.sqrt(3 / 8))
    assert runs["llama", "ria", 0.6, "best"] == 4
    page = results.replaced("a\n<!-- tables -->\nold\n<!-- end -->\nb\n", results.tables(tmp_path))
    assert page.startswith("a\n") and page.endswith("<!-- end -->\nb\n") and "old" not in page
    assert "4 finished cases." in page
