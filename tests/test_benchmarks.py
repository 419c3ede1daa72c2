"""The published procedure, written plainly in `benchmarks/`, and the engine find the same masks."""

import importlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from neuroal import Recipe

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


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("results")
    logging.disable(logging.NOTSET)  # which its command turns off


COSTS = {("", "", 0.0): 0.0, ("wanda", "uniform", 0.7): 0.4, ("wanda", "best", 0.7): 0.1}
COSTS |= {("ria", "uniform", 0.6): 0.2, ("ria", "best", 0.6): 0.3}  # ratios 1/4 and 3/2


def write_cases(results: ModuleType, folder: Path) -> None:
    (folder / "cases").mkdir(parents=True)
    for i, ((pruner, top_up, sparsity), cost) in enumerate(COSTS.items()):
        scores = {text: {"value": 20 * math.exp(cost)} for text in results.TEXTS}
        case = {"model": "llama", "pruner": pruner or None, "sparsity": sparsity}
        report = {"counts": {"block_runs": i}} if pruner else None
        content: dict[str, Any] = {"status": "done", "case": {**case, "top_up": top_up or None}}
        content |= {"scores": scores, "report": report}
        (folder / "cases" / f"{i}.json").write_text(json.dumps(content))


def test_results_compare_what_pruning_costs(results: ModuleType, tmp_path: Path) -> None:
    write_cases(results, tmp_path)
    known = results.read_scores(tmp_path)
    found = results.ratios(known, "best", "uniform", "ptb")
    assert found == {
        ("llama", "wanda", 0.7): pytest.approx(1 / 4),
        ("llama", "ria", 0.6): pytest.approx(3 / 2),
    }
    assert results.geometric(found.values()) == pytest.approx(math.sqrt(3 / 8))
    assert known["llama", "ria", 0.6, "best"]["block_runs"] == 4
    page = results.replaced("a\n<!-- tables -->\nold\n<!-- end -->\nb\n", results.tables(known))
    assert page.startswith("a\n") and page.endswith("<!-- end -->\nb\n") and "old" not in page
    assert "4 finished cases." in page
    assert "\nBlock runs, the final pruning included\n" in page


def test_results_are_merged_into_the_record(results: ModuleType, tmp_path: Path) -> None:
    write_cases(results, tmp_path / "new")
    page, record = tmp_path / "page.md", tmp_path / "page.csv"
    empty = "<!-- tables -->\n<!-- end -->\n"
    page.write_text(empty)
    header = "model,pruner,sparsity,top_up,wikitext2,ptb,heldout,block_runs"
    before = "opt,alps,0.8,best,71.0,72.5,73.25,"
    record.write_text(f"{header}\n{before}\nllama,ria,0.6,best,1.0,1.0,1.0,\n")

    def tables(folder: str, *out: str) -> Result:
        given = [str(tmp_path), "--results", str(tmp_path / folder), "--only-tables", *out]
        return CliRunner().invoke(results.main, given)

    done = tables("new", "--out", str(page))
    assert done.exit_code == 0, done.output
    lines = record.read_text().splitlines()
    value = repr(20 * math.exp(0.3))  # every digit of the folder's
    assert lines[0] == header
    assert lines[1] == "llama,,0,,20.0,20.0,20.0,"
    assert [line.split(",")[1:4] for line in lines[2:6]] == [
        ["wanda", "0.7", "uniform"],
        ["wanda", "0.7", "best"],
        ["ria", "0.6", "uniform"],
        ["ria", "0.6", "best"],
    ]
    assert lines[5] == f"llama,ria,0.6,best,{value},{value},{value},4"
    assert lines[6:] == [before]
    made = page.read_text()
    assert "5 finished cases." in made
    assert "\nBlock runs, the final pruning included, of the 4 cells where they are on rec" in made
    page.write_text(empty)
    assert tables("none", "--out", str(page)).exit_code == 0
    assert (page.read_text(), record.read_text().splitlines()) == (made, lines)
    assert "4 finished cases." in tables("new").output  # the folder's alone
    record.unlink()
    assert "there is no finished case in" in tables("none", "--out", str(page)).output
    assert page.read_text() == made and not record.exists()


def test_results_of_the_page_are_on_record(results: ModuleType, tmp_path: Path) -> None:
    docs = BENCHMARKS.parent / "docs"
    known = results.read_record(docs / "results.csv")
    results.write_record(tmp_path / "again.csv", known)
    assert (tmp_path / "again.csv").read_bytes() == (docs / "results.csv").read_bytes()
    said = results.tables(known).partition("\n")[0]
    assert f"\n{said}\n" in (docs / "results.md").read_text(encoding="utf-8")


def test_both_rules_of_the_first_token_predict_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bos = importlib.import_module("bos")
    ids = torch.tensor([[9, 1, 2, 3], [9, 4, 5, 6], [9, 7, 8, 0]])
    found = bos.windows(ids, 9)
    assert found["always"].tolist() == [[9, 4, 5, 6], [9, 7, 8, 0]]
    assert found["never"].tolist() == [[3, 4, 5, 6], [6, 7, 8, 0]]


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("real")


def test_cells_of_real_models_are_recipes_of_their_own(real: ModuleType) -> None:
    cells = list(real.cells("smollm2"))
    assert len({cell.file for cell in cells}) == len(cells)
    recipes = [Recipe(**cell.recipe()) for cell in cells if cell.pruner]
    assert len({recipe.digest() for recipe in recipes}) == len(recipes)
    assert {recipe.top_up for recipe in recipes} >= {"low", "medium", "high", "max", "neuroal"}


def test_record_of_real_models(real: ModuleType, tmp_path: Path) -> None:
    """A record comes back as written; a table has the excess, and the best method first."""
    dense, *cells = list(real.cells("smollm2"))[:3]
    texts = dict.fromkeys(real.TEXTS, 40.0)
    costs = {"block_runs": 10.0, "seconds": 2.0, "mebibytes": 100.0}
    worse, better = ({t: n * x for t, x in texts.items()} | costs for n in (4, 2))
    record = dict(zip((dense, *cells), (texts, worse, better), strict=True))
    real.write_record(tmp_path / "real.csv", record)
    assert real.read_record(tmp_path / "real.csv") == record
    lines = [x for x in real.tables(record).splitlines() if x.startswith("|")][2:]
    assert [f"({math.log(n):.2f})" in x for n, x in zip((2, 4), lines, strict=True)] == [True] * 2
