"""The report of a study: its cells are means of the cases, and its front is the Pareto front."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from neuroal import UsageError
from neuroal.html_report import LARGEST, write
from neuroal.html_report.study_figures import front
from neuroal.study.table import MeanScore

SCORES: dict[tuple[str, str, float], tuple[Sequence[float | str], float]] = {
    # (pruner, top-up, sparsity): perplexity by seed, seconds
    ("magnitude", "uniform", 0.5): ([30.0, 32.0], 1.0),
    ("magnitude", "neuroal", 0.5): ([28.0, 29.0], 20.0),
    ("wanda", "uniform", 0.5): ([26.0, 26.0], 5.0),
    ("wanda", "neuroal", 0.5): ([25.0, 25.5], 25.0),
    ("magnitude", "uniform", 0.7): (["inf", 4000.0], 1.0),
    ("magnitude", "neuroal", 0.7): ([100.0, 120.0], 20.0),
    ("wanda", "uniform", 0.7): ([80.0, 90.0], 5.0),
    ("wanda", "neuroal", 0.7): ([60.0, 70.0], 25.0),
}
NAME = "small <script>"


def score(value: float | str, metric: str = "perplexity") -> dict[str, Any]:
    more = {"stderr": None, "seconds": 1.0, "evaluation": "0", "protocol": {}}
    return {"value": value, "metric": metric, "higher_is_better": metric == "acc", **more}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with two seeds, a failed case, a missing one and a skipped one."""
    folder = tmp_path_factory.mktemp("study") / "results"
    (folder / "cases").mkdir(parents=True)
    entries: list[dict[str, Any]] = []

    def add(labels: dict[str, Any], **content: Any) -> None:
        ident = f"{len(entries):016x}"
        entries.append({"id": ident, "case": labels})
        if content:
            case = {"schema": 1, "id": ident, "case": labels, "error": None, **content}
            (folder / "cases" / f"{ident}.json").write_text(json.dumps(case))

    dense = dict.fromkeys(("pruner", "top_up", "pattern", "seed"))
    seconds = {"prune": None, "evaluate": 2.0}
    scores = {"text": score(20.0), "task": score(0.8, "acc")}
    done = {"status": "done", "recipe": None, "report": None}
    add({"model": NAME, "sparsity": 0.0, **dense}, scores=scores, seconds=seconds, **done)
    for (pruner, top_up, sparsity), (values, took) in SCORES.items():
        for seed, value in enumerate(values):
            labels = {"model": NAME, "pruner": pruner, "top_up": top_up, "sparsity": sparsity}
            labels |= {"pattern": "unstructured", "seed": seed}
            accuracy = score(0.75 if top_up == "neuroal" else 0.5, "acc")
            add(
                labels,
                scores={"text": score(value), "task": accuracy},
                seconds={"prune": took, "evaluate": 1.0},
                **(done | {"report": {}, "recipe": {}}),
            )
    base = {"model": NAME, "pattern": "unstructured", "pruner": "wanda", "sparsity": 0.7, "seed": 0}
    add(
        base | {"top_up": "broken"},
        **{"status": "failed", "error": "it <b>broke</b>", "scores": {}},
        **{"report": None, "recipe": {}, "seconds": {"prune": 0.0, "evaluate": 0.0}},
    )
    add(base | {"top_up": "later"})
    content = {
        **{"schema": 1, "kind": "study", "name": NAME, "neuroal": "0.1.0", "cases": entries},
        "study": {"models": [{"name": NAME, "label": NAME, "dtype": None}], "seeds": [0, 1]},
        "skipped": [{"case": base | {"top_up": "x"}, "reason": "rows are refused"}],
    }
    (folder / "study.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def page(study: Path, read: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert write([study], out) < LARGEST
    assert "<script" not in out.read_text() and "<b>" not in out.read_text()
    return read(out)


def comparison(page: Any, title: str) -> dict[tuple[str, str], list[tuple[float, str, bool]]]:
    """By pruner and top-up, a row's cells: number, as it is shown, whether it is marked."""
    (section,) = (s for s in page.all("section") if [h.text for h in s.all("h3")] == [title])
    rows = {}
    for row in section.all("tbody")[0].all("tr"):
        method = tuple(h.text for h in row.all("th"))
        rows[method] = [
            (
                float(cell.all("data")[0].attributes["value"]),
                cell.all("data")[0].text,
                "best" in cell.attributes["class"] and "★" in cell.text,
            )
            for cell in row.all("td")
        ]
    return rows  # type: ignore[return-value]


def test_cells_are_means_over_seeds_and_the_best_is_marked(page: Any) -> None:
    rows = comparison(page, f"{NAME}, text")
    assert rows["dense", ""] == [(20.0, "20.00", False)] * 2
    root_half = math.sqrt(0.5)
    assert rows["wanda", "neuroal"] == [
        (25.25, f"25.25 ± {root_half / 2:.2f}", True),
        (65.0, f"65.00 ± {10 * root_half:.2f}", True),
    ]
    assert rows["wanda", "uniform"] == [
        (26.0, "26.00 ± 0.00", False),
        (85.0, f"85.00 ± {10 * root_half:.2f}", False),
    ]
    assert rows["magnitude", "neuroal"][1] == (110.0, f"110.00 ± {20 * root_half:.2f}", True)
    assert rows["magnitude", "uniform"][0] == (31.0, f"31.00 ± {2 * root_half:.2f}", False)
    assert rows["magnitude", "uniform"][1] == (math.inf, "inf", False)
    accuracies = comparison(page, f"{NAME}, task")
    assert accuracies["dense", ""] == [(0.8, "80.0%", False)] * 2
    assert accuracies["wanda", "neuroal"] == [(0.75, "75.0% ± 0.0%", True)] * 2


def figure(page: Any, title: str) -> Any:
    return next(f for f in page.all("figure") if f.all("h3")[0].text == title)


def marks(figure: Any) -> list[str]:
    return [t.text for t in figure.all("svg")[0].all("title")[1:]]


def test_scores_against_sparsity(page: Any) -> None:
    found = figure(page, f"Perplexity against sparsity: {NAME}, text")
    said = marks(found)
    assert len(said) == len(SCORES) - 1  # what is not finite is not drawn, and said to be missing
    assert f"wanda + neuroal, 70%: 65.00 ± {10 * math.sqrt(0.5):.2f}" in said
    caption = found.all("figcaption")[0].text
    assert "Not drawn, since not finite: 1 of 8 scores" in caption and "Dense: 20.00" in caption
    texts = {t.text for t in found.all("svg")[0].all("text")}
    assert {"magnitude", "wanda", "uniform", "neuroal", "dense", "50%", "70%"} <= texts


def test_the_front_is_marked(page: Any) -> None:
    found = figure(page, f"Perplexity against time: {NAME}, text")
    rows = [[cell.text for cell in row.all("td")] for row in found.all("tbody")[0].all("tr")]
    on = {(r[0], r[1], r[2]) for r in rows if r[-1] == "yes"}
    # at 0.7 magnitude's uniform is not finite, and wanda's beats magnitude's neuroal in both
    assert on == {
        *(("magnitude", "uniform", "0.5"), ("wanda", "uniform", "0.5")),
        *(("wanda", "neuroal", "0.5"), ("wanda", "uniform", "0.7"), ("wanda", "neuroal", "0.7")),
    }
    assert sum(m.endswith("on the front") for m in marks(found)) == 5
    assert "Pareto front" in found.all("figcaption")[0].text


def test_what_is_missing_is_said(page: Any) -> None:
    notes = [x.text for x in page.all("li")]
    assert f"{NAME}, wanda + broken, 70%, seed 0 failed: it <b>broke</b>" in notes
    assert "1 of 19 cases have not run: their cells are empty" in notes
    assert "left out of the study, 1 case: rows are refused" in notes
    facts = {d.all("dt")[0].text: d.all("dd")[0].text for d in page.all("dl")[0].all("div")}
    assert facts["Cases done"] == "17 of 19 1 failed, 1 missing"
    assert facts["Time of pruning"].startswith("3 min 24 s")  # 2 × (1 + 20 + 5 + 25) × 2
    assert page.all("h1")[0].text == f"Study: {NAME}"


def cell(seconds: float | None, mean: float) -> MeanScore:
    return MeanScore("m", None, "p", "t", 0.5, "e", "x", mean, None, 1, 0, False, seconds)


@pytest.mark.parametrize("higher", [False, True])
def test_front(higher: bool) -> None:
    points = [(1.0, 9.0), (2.0, 9.0), (2.0, 5.0), (3.0, 6.0), (4.0, 4.0), (4.0, 4.0), (5.0, 4.5)]
    sign = -1 if higher else 1
    cells = [cell(s, sign * y) for s, y in points]
    cells += [cell(None, sign * 0.0), cell(0.5, math.nan), cell(0.5, sign * math.inf)]

    def beaten(c: MeanScore) -> bool:
        better = [
            d
            for d in cells
            if d.seconds is not None and math.isfinite(d.mean) and d.seconds <= c.seconds  # type: ignore[operator]
            and sign * d.mean <= sign * c.mean and (d.seconds, d.mean) != (c.seconds, c.mean)
        ]  # fmt: skip
        return bool(better)

    slow = {(c.seconds, c.mean) for c in cells[: len(points)] if not beaten(c)}
    assert [(c.seconds, c.mean) for c in front(cells, higher)] == sorted(slow)  # type: ignore[type-var]
    assert len(slow) == 3


def test_a_study_that_has_not_begun(study: Path, tmp_path: Path, read: Callable[..., Any]) -> None:
    (tmp_path / "cases").mkdir()
    (tmp_path / "study.json").write_text((study / "study.json").read_text())
    write([tmp_path], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.all("figure") == [] and "19 of 19 cases have not run" in page.text


def test_another_schema(study: Path, tmp_path: Path) -> None:
    content = json.loads((study / "study.json").read_text()) | {"schema": 9}
    (tmp_path / "study.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"study\.json' has schema 9, this neuroal reads 1"):
        write([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_case_is_a_run(
    run: Path, report_of: Callable[..., Any], tmp_path: Path, read: Callable[..., Any]
) -> None:
    case = {"schema": 1, "id": "0123", "case": {}, "status": "done", "report": report_of(run)}
    (tmp_path / "0123.json").write_text(json.dumps(case))
    write([tmp_path / "0123.json"], tmp_path / "report.html")
    assert len(read(tmp_path / "report.html").all("figure")) == 6


def test_a_study_and_a_run_on_one_page(
    study: Path, run: Path, tmp_path: Path, read: Callable[..., Any]
) -> None:
    write([study, run], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert [a.text for a in page.all("nav")[0].all("a")] == [
        f"Study: {NAME}",
        "some/llama, wanda + neuroal, 60.0%",
    ]
    assert len(page.all("figure")) == 4 + 6
