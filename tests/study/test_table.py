"""Mean, deviation and the best, on results written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from neuroal.cli.study_text import csv_text, number, tables_text
from neuroal.study.results import read_study
from neuroal.study.table import MeanScore, cells


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One model, two top-ups, two sparsities, two seeds; of `owl` at 0.7 one seed is missing."""
    values = {
        ("uniform", 0.5): (10.0, 14.0), ("owl", 0.5): (10.0, 11.0),
        ("uniform", 0.7): (1000.0, 3000.0), ("owl", 0.7): (2500.0,),
    }  # fmt: skip
    entries: list[dict[str, Any]] = []

    def add(case: dict[str, Any], value: float, accuracy: float) -> None:
        id = f"{len(entries):016x}"
        entries.append({"id": id, "case": case})
        score = {"evaluation": "e", "stderr": None, "seconds": 1.0, "protocol": {}}
        content = {
            "schema": 1, "id": id, "case": case, "status": "done",
            "scores": {
                "wiki": score | {
                    "value": value, "metric": "perplexity", "higher_is_better": False
                },
                "task_a": score | {
                    "value": accuracy, "metric": "acc", "higher_is_better": True
                },
            },
            "report": None if case["pruner"] is None else {}, "seconds": {"prune": value / 10},
        }  # fmt: skip
        (tmp_path / "cases" / f"{id}.json").write_text(json.dumps(content))

    (tmp_path / "cases").mkdir()
    dense = {"model": "m", "pruner": None, "top_up": None, "sparsity": 0.0, "pattern": None}
    add(dense | {"seed": None}, 8.0, 0.9)
    for (top_up, sparsity), of_seeds in values.items():
        for seed, value in enumerate(of_seeds):
            case = {"model": "m", "pruner": "wanda", "top_up": top_up, "sparsity": sparsity}
            add(case | {"pattern": "unstructured", "seed": seed}, value, 0.5 + seed / 10)
    missing = entries[-1]["case"] | {"seed": 1}
    entries.append({"id": "f" * 16, "case": missing})
    study = {"schema": 1, "name": "s", "cases": entries, "skipped": []}
    (tmp_path / "study.json").write_text(json.dumps(study))
    return tmp_path


def one(found: list[MeanScore], top_up: str | None, sparsity: float, evaluation: str) -> MeanScore:
    (cell,) = (
        c for c in found if (c.top_up, c.sparsity, c.evaluation) == (top_up, sparsity, evaluation)
    )
    return cell


def test_mean_and_deviation_of_the_seeds(folder: Path) -> None:
    found = cells(read_study(folder))
    assert len(found) == 2 * 5
    cell = one(found, "uniform", 0.5, "wiki")
    assert (cell.mean, cell.seeds, cell.missing) == (12.0, 2, 0)
    assert cell.deviation == pytest.approx(math.sqrt(((10 - 12) ** 2 + (14 - 12) ** 2) / (2 - 1)))
    assert cell.seconds == pytest.approx((1.0 + 1.4) / 2)
    alone = one(found, "owl", 0.7, "wiki")
    assert (alone.mean, alone.deviation, alone.seeds, alone.missing) == (2500.0, None, 1, 1)


def test_the_best_of_each_comparison(folder: Path) -> None:
    found = cells(read_study(folder))
    best = {(c.top_up, c.sparsity, c.evaluation) for c in found if c.best}
    assert best == {
        ("owl", 0.5, "wiki"), ("uniform", 0.7, "wiki"),  # the lower perplexity
        ("owl", 0.5, "task_a"), ("uniform", 0.5, "task_a"),  # equal: both
        ("uniform", 0.7, "task_a"),  # the higher accuracy, 0.55 against 0.5
    }  # fmt: skip


def test_a_number_that_is_none_is_never_the_best(folder: Path) -> None:
    for path in (folder / "cases").iterdir():
        content = json.loads(path.read_text())
        if content["case"]["top_up"] == "owl" and content["case"]["seed"] == 0:
            content["scores"]["wiki"]["value"] = "nan"
            path.write_text(json.dumps(content))
    found = cells(read_study(folder))
    assert math.isnan(one(found, "owl", 0.5, "wiki").mean)
    assert one(found, "uniform", 0.5, "wiki").best


def test_github(folder: Path) -> None:
    found = [c for c in cells(read_study(folder)) if c.evaluation == "wiki"]
    lines = tables_text(found, "github").splitlines()
    assert lines[:2] == ["**wiki (perplexity)**", ""]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert set("".join(rows.pop(1))) <= set("-:")
    assert rows == [
        ["model", "pruner", "top-up", "0 %", "50 %", "70 %"],
        ["m", "dense", "", "8.00", "", ""],
        ["m", "wanda", "uniform", "", "12.00 ± 2.83", "**2000 ± 1414**"],
        ["m", "wanda", "owl", "", "**10.50 ± 0.71**", "2500 (1 of 2)"],
    ]


def test_latex(folder: Path) -> None:
    found = [c for c in cells(read_study(folder)) if c.evaluation == "task_a"]
    text = tables_text(found, "latex")
    assert text.startswith("% task_a (acc, %)\n\\begin{tabular}")
    assert "50 \\%" in text and "\\textbf{55.00 $\\pm$ 7.07}" in text
    assert text.count("\\\\") == 4


def test_latex_names_are_escaped() -> None:
    cell = MeanScore(
        "a_b", "2:4", "w&x", "50%", 0.5, "e", "perplexity", 1.0, None, 1, 0, False, 1.0
    )
    assert "a\\_b & w\\&x & 50\\%" in " ".join(tables_text([cell], "latex").split())


def test_csv_is_a_line_a_cell(folder: Path) -> None:
    lines = csv_text(cells(read_study(folder))).splitlines()
    assert lines[0] == (
        "model,pattern,pruner,top_up,sparsity,evaluation,metric,mean,deviation,seeds,missing,best,"
        "seconds"
    )
    assert len(lines) == 1 + 10
    assert lines[1] == "m,,,,0.0,wiki,perplexity,8.0,,1,0,False,"


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (5.678, "perplexity", "5.68"),
        (12345.6, "perplexity", "12346"),
        (2.5e7, "perplexity", "2.5e+07"),
        (math.inf, "perplexity", "inf"),
        (0.4567, "acc", "45.67"),
        (0.4567, "acc_norm", "45.67"),
    ],
)
def test_numbers(value: float, metric: str, text: str) -> None:
    assert number(value, metric) == text
