"""Running a study: each case as if alone, none twice, none lost, one failure no obstacle."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import neuroal
from neuroal.data import calibration
from neuroal.errors import NeuroalError, UsageError
from neuroal.evaluation.perplexity import evaluation_windows, perplexity
from neuroal.model import pretrained
from neuroal.search import measurements
from neuroal.study import bench, scores
from neuroal.study.results import CaseResult, case_file, read_study
from neuroal.study.run import Execution, PreparedStudy, prepare, run

Change = Callable[..., PreparedStudy]
Finish = Callable[..., list[CaseResult]]

FAILS_ON_OPT = """
from dataclasses import dataclass
from neuroal import hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    @hookimpl
    def score_weights(self, weight, linear):
        if "fc1" in linear.name:
            raise ValueError("no scores for fc1")
        return weight.abs()
"""
# Stays in the case after the seventh until it is killed, and nowhere a second time.
STAYS = """
import time
from dataclasses import dataclass
from pathlib import Path
from neuroal import hookimpl

DESK = Path({desk!r})

@dataclass(frozen=True, eq=False)
class Mine:
    @hookimpl
    def score_weights(self, weight):
        finished = len(list((DESK / "out/cases").glob("*.json")))
        if finished == 7 and not (DESK / "stays").exists():
            (DESK / "stays").touch()
            time.sleep(3600)
        return weight.abs()
"""


def by_id(results: list[CaseResult]) -> dict[str, CaseResult]:
    return {result["id"]: result for result in results}


def values(result: CaseResult) -> dict[str, float]:
    return {name: float(score["value"]) for name, score in result["scores"].items()}


def without_time(report: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in report.items() if "memory" not in k and k != "timings"}


def test_each_case_equals_the_same_case_run_alone(
    prepared: Change, finish: Finish, tmp_path: Path
) -> None:
    what = prepared()
    found = by_id(finish(what))
    assert len(found) == 18
    for number, case in enumerate(what.expansion.cases):
        result = found[case.id]
        assert result["status"] == "done"
        folder = case.model
        if case.recipe is not None:
            folder = str(tmp_path / f"alone-{number}")
            report = neuroal.prune(case.model, recipe=case.recipe, out=folder).to_json()
            assert report.pop("weight_bytes")["pruned"] > 0
            assert result["report"].pop("weight_bytes") == {}  # nothing was written
            for linear in report["linears"].values():
                linear["tensors"] = []  # which of a model in memory are in no file
            assert without_time(result["report"]) == without_time(report)
        model, tokenizer = pretrained.load(folder)
        rows = evaluation_windows("rows.jsonl", tokenizer)
        text = evaluation_windows("text.txt", tokenizer, length=16, windows=3)
        expected = {"rows": perplexity(model, rows), "text": perplexity(model, text)}
        assert values(result) == {name: x.perplexity for name, x in expected.items()}
        assert result["scores"]["text"]["protocol"] == {
            k: v for k, v in expected["text"].to_json().items() if k != "perplexity"
        }


def test_what_cases_share_is_made_once(
    prepared: Change, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*arguments: Any, **more: Any) -> Any:
            made[name] += 1
            return function(*arguments, **more)

        monkeypatch.setattr(module, name, call)

    what = prepared()
    counted(pretrained, "load")
    counted(calibration, "calibration_windows")
    counted(measurements, "measure_blocks")
    counted(scores, "windows_for")
    finish(what)
    # Two models; two texts for each.
    assert made == {
        "load": 2, "calibration_windows": 2, "measure_blocks": 2, "windows_for": 4
    }  # fmt: skip


def test_calibration_text_among_the_evaluated_is_said_once_a_model(
    prepared: Change, finish: Finish, caplog: pytest.LogCaptureFixture
) -> None:
    finish(prepared())
    said = [r.getMessage() for r in caplog.records if "overlap" in r.getMessage()]
    assert len(said) == 2  # llama and opt; text.txt shares nothing with rows.jsonl
    assert all(m.count("rows.jsonl") == 2 for m in said)


def test_a_finished_case_is_never_run_again(
    prepared: Change, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(prepared())
    before = {path: path.read_bytes() for path in Path("out/cases").iterdir()}
    assert len(before) == 18
    again = prepared()
    assert (again.finished, again.jobs) == (18, ())
    monkeypatch.setattr(pretrained, "load", None)  # nothing is loaded either
    assert finish(again) == []
    more = prepared(("[0.5, 0.7]", "[0.5, 0.6, 0.7]"))
    assert [case.labels["sparsity"] for case, _ in more.jobs] == [0.6] * 8
    assert {path: path.read_bytes() for path in Path("out/cases").iterdir()} == before


def test_only_a_new_evaluation_is_measured(
    prepared: Change, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = (('models = ["llama", "opt"]', 'models = ["opt"]'), ('"wanda"]', '"wanda"]'))
    old = by_id(finish(prepared(*small)))
    what = prepared(("windows = 3", 'windows = 3\n[[evaluations]]\ndata = "text.txt"\nlabel = "x"'))
    assert len(what.jobs) == 9
    measured: list[int] = []

    def count(model: Any, windows: Any, **more: Any) -> Any:
        measured.append(len(windows.ids))
        return perplexity(model, windows, **more)

    monkeypatch.setattr(scores, "perplexity", count)
    new = by_id(finish(what))
    assert len(measured) == 9
    for id, result in new.items():
        assert list(result["scores"]) == ["rows", "text", "x"]
        assert result["scores"]["rows"] == old[id]["scores"]["rows"]
    assert prepared().jobs == ()


def test_a_text_is_measured_anew_where_it_is_cut_otherwise(
    prepared: Change, finish: Finish
) -> None:
    small = (
        ('models = ["llama", "opt"]', 'models = ["opt"]'),
        ("sparsities = [0.5, 0.7]", "sparsities = [0.5]"),
        ('"magnitude", ', ""),
        ('"uniform", ', ""),
    )
    before = by_id(finish(prepared(*small)))
    what = prepared(("windows = 3", "windows = 3\npack_documents = true"))
    assert len(what.jobs) == len(before) == 2  # the dense model, and the pruned one
    for id, result in by_id(finish(what)).items():
        old, new = before[id]["scores"], result["scores"]
        assert new["rows"] == old["rows"]
        assert new["text"]["evaluation"] != old["text"]["evaluation"]
        assert "tokenised one by one and joined by '</s>'" in new["text"]["protocol"]["protocol"]


def test_a_failing_case_is_recorded_and_stops_no_other(
    prepared: Change, finish: Finish, desk: Path
) -> None:
    (desk / "mine.py").write_text(FAILS_ON_OPT)
    what = prepared(('"wanda"', '"mine.py:Mine"'))
    found = finish(what)
    assert len(found) == 18
    failed = [result for result in found if result["status"] == "failed"]
    assert [r["case"]["model"] for r in failed] == ["opt"] * 4
    assert {r["case"]["pruner"] for r in failed} == {"Mine"}
    stored = json.loads(case_file(what.out, failed[0]["id"]).read_text())
    assert "score_weights" in stored["error"] and "no scores for fc1" in stored["error"]
    assert "\n" not in stored["error"]
    assert stored["traceback"].startswith("Traceback")
    assert stored["scores"] == {}
    # The weights that it has left half pruned are put back: the next case's are as ever.
    after = next(c for c in what.expansion.cases if c.labels["model"] == "opt" and c.recipe)
    result = next(r for r in found if r["id"] == after.id)
    assert result["report"]["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3)
    again = prepared()
    assert [case.id for case, _ in again.jobs] == [r["id"] for r in failed]


def test_a_model_whose_weights_do_not_load(prepared: Change, finish: Finish, desk: Path) -> None:
    (desk / "llama/model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(NeuroalError, match=r"models\[1\] 'llama': cannot read 'llama/model"):
        prepared()


def test_a_killed_study_goes_on_where_it_was(
    prepared: Change,
    finish: Finish,
    desk: Path,
    start_process: Callable[..., subprocess.Popen[str]],
    until: Callable[..., None],
) -> None:
    (desk / "mine.py").write_text(STAYS.format(desk=str(desk)))
    what = prepared(('"wanda"', '"mine.py:Mine"'))
    command = [sys.executable, "-m", "neuroal", "study", "run", "study.toml", "--out", "out"]
    process = start_process([*command, "-q", "--allow-plugin-files"])
    cases = desk / "out/cases"
    until((desk / "stays").exists, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = prepare(Path("study.toml"), Path("out"), allow_plugin_files=True)
    assert left.finished == 7
    kept = {path: path.read_bytes() for path in cases.glob("*.json")}
    assert len(kept) == left.finished  # each of them whole
    finish(left)
    assert {path: path.read_bytes() for path in kept} == kept
    results = read_study(what.out)
    assert [case["status"] for case in results.cases] == ["done"] * 18
    once = by_id(list(run(dataclasses.replace(what, out=desk / "once"), Execution())))
    assert {c["id"]: values(c) for c in results.cases} == {i: values(r) for i, r in once.items()}


def test_a_results_folder_of_another_kind(prepared: Change, finish: Finish, desk: Path) -> None:
    (desk / "out").mkdir()
    (desk / "out/mine.txt").touch()
    with pytest.raises(UsageError, match="'out' exists and holds no study: choose another --out"):
        prepared()
    (desk / "out/mine.txt").unlink()
    what = prepared(('"opt"]', "]"), ('"magnitude", "wanda"', '"wanda"'))
    finish(what)
    file = case_file(what.out, what.expansion.cases[0].id)
    for path in (file, desk / "out/study.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"schema": 99}))
        with pytest.raises(UsageError, match=r"has schema 99, this neuroal reads 1: use"):
            prepare(Path("study.toml"), Path("out"))
        path.write_text("{")
        if path == file:  # of one case: it is made anew
            assert len(prepare(Path("study.toml"), Path("out")).jobs) == 1
        else:
            with pytest.raises(UsageError, match=r"cannot read '.*json': .*; remove it to go on"):
                prepare(Path("study.toml"), Path("out"))
        path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"no results folder of a study: it holds no study.json"):
        read_study(desk)


def test_a_case_file_is_a_recipe(prepared: Change, finish: Finish) -> None:
    """`neuroal prune --recipe out/cases/ID.json` runs a case alone."""
    from neuroal.cli.recipe import read_recipe

    what = prepared()
    finish(what)
    case = what.expansion.cases[-1]
    recorded = read_recipe(str(case_file(what.out, case.id)))
    assert recorded is not None
    assert neuroal.Recipe.from_json(recorded["recipe"]) == case.recipe


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"jobs": 0}, "0 jobs are too few: give at least 1"),
        ({"executor": "rai"}, "executor 'rai' is unknown: did you mean 'ray'?"),
        ({"gpus_per_case": -1.0}, "-1.0 GPUs per case are too few"),
        ({"gpus_per_case": 0.5}, "--gpus-per-case is for --executor ray"),
        (
            {"executor": "ray", "gpus_per_case": 1.5},
            "1.5 GPUs per case: give a fraction of one, or a whole number",
        ),
    ],
)
def test_how_makes_sense(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Execution(**how)
    assert message in str(error.value)


def test_a_bench_lets_go_of_one_model_before_the_next(
    prepared: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = prepared()
    working = bench.Bench(what.study.evaluations, False)
    load = pretrained.load
    held: list[object] = []

    def watched(*arguments: Any) -> Any:
        held.append(working._loaded)
        return load(*arguments)

    monkeypatch.setattr(pretrained, "load", watched)
    for case in (what.expansion.cases[0], what.expansion.cases[9], what.expansion.cases[0]):
        assert working.run(case, {})["status"] == "done"
    assert held == [None] * 3


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"schema": 1}', '{"schema": 1, "id": "x", "status": "done", "scores": 3}'],
)
def test_a_damaged_case_is_named_and_run_again(
    text: str, prepared: Change, finish: Finish, caplog: pytest.LogCaptureFixture
) -> None:
    small = (('"magnitude", "wanda"', '"magnitude"'), ('"uniform", "owl"', '"uniform"'))
    what = prepared(*small, ("0.5, 0.7", "0.5"), ('"llama", "opt"', '"llama"'))
    finish(what)
    case = what.expansion.distinct[0]
    file = case_file(what.out, case.id)
    whole = json.loads(file.read_text())["scores"]
    file.write_text(text)
    left = prepared()
    assert [job.id for job, _ in left.jobs] == [case.id]
    assert f"case '{file}' is damaged and left out" in caplog.text
    assert [c["id"] for c in read_study(what.out).cases if c["status"] == "missing"] == [case.id]
    finish(left)
    scores = json.loads(file.read_text())["scores"]
    assert {k: x["value"] for k, x in scores.items()} == {k: x["value"] for k, x in whole.items()}


@pytest.mark.parametrize("key", ["name", "study", "cases", "skipped"])
def test_a_damaged_study_is_named(key: str, prepared: Change, tmp_path: Path) -> None:
    content = {"schema": 1, "name": "x", "study": {}, "cases": [], "skipped": []}
    lacking = {k: v for k, v in content.items() if k != key}
    for wrong in [content | {key: 3}, *([lacking] if key in ("name", "cases") else [])]:
        (tmp_path / "study.json").write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match=f"study.json' is damaged: its '{key}' is missing"):
            read_study(tmp_path)
