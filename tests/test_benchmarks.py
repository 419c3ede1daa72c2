"""The published procedure, written plainly in `benchmarks/`, and the engine find the same masks."""

import importlib
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


def test_grids_are_thinned_out(speed: ModuleType) -> None:
    block, row = speed.grids(None)
    assert len(block) == 14 and len(row) == 15
    assert [len(g) for g in speed.grids(2)] == [2, 2]
