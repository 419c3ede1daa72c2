"""A report says in one line what happened, and its parts are tables."""

import html
import json
import re

import pytest

import neuroal
from neuroal import Report
from neuroal.testing import tiny_model, windows


@pytest.fixture(scope="module")
def report() -> Report:
    return neuroal.prune(
        tiny_model("llama", blocks=2),
        windows=windows(4, 16),
        sparsity=0.6,
        samples=4,
        search_samples=2,
        top_up="neuroal",
        device="cpu",
        options={"linear_schedule": {"lambdas": [0.05, 0.1]}, "neuroal": {"lambdas": [0.0, 0.1]}},
    )


def test_its_repr_is_one_line(report: Report) -> None:
    text = repr(report)
    chosen = report.selected()
    assert text.startswith("Report(model LlamaForCausalLM, pruner wanda, block ratios linear_sch")
    assert f"linear_schedule λ = {chosen['block_ratios']['parameters']['lam']:g}, " in text
    assert "row ratios neuroal λ = " in text
    assert f"sparsity {report.sparsity['achieved']:.6f} of 0.6 wanted, took " in text
    assert "\n" not in text and len(text) < 250


def test_a_notebook_shows_tables(report: Report) -> None:
    page = report._repr_html_()
    assert page.count("<table>") == page.count("</table>") == 2
    cells = [html.unescape(x) for x in re.findall(r"<td>(.*?)</td>", page)]
    assert "model.layers.1" in cells and f"{report.blocks[1]['achieved']:.4f}" in cells
    strange = Report(**(report.to_json() | {"notes": ["a <b> & c"], "model": {"name": "<i>"}}))
    assert "<b>" not in strange._repr_html_() and "a &lt;b&gt; &amp; c" in strange._repr_html_()


def test_records_are_flat_and_complete(report: Report) -> None:
    for records in (report.candidate_records(), report.linear_records(), report.timing_records()):
        assert records and all(not isinstance(v, (dict, list)) for r in records for v in r.values())
        assert json.loads(json.dumps(records)) == records
    candidates = report.candidate_records()
    assert [c["misalignment"] for c in candidates] == [c["misalignment"] for c in report.candidates]
    assert [c["lam"] for c in candidates if c["role"] == "block_ratios"] == [0.05, 0.1]
    linears = {r["linear"]: r for r in report.linear_records()}
    assert linears.keys() == report.linears.keys()
    name = "model.layers.1.mlp.up_proj"
    recorded, row = report.linears[name], linears[name]
    assert row["block"] == "model.layers.1" and row["achieved"] == recorded["achieved"]
    assert [row[f"row_{k}"] for k in ("min", "mean", "max")] == list(recorded["rows"].values())
    assert row["input_norm_dense"] == recorded["input_norm"]["dense"]
    assert row["input_norm_pruned"] is None  # the last block does not run pruned
    assert {r["phase"]: r["seconds"] for r in report.timing_records()} == report.timings


def test_parameters_that_share_a_name_with_a_measure_are_told_apart() -> None:
    made = {"role": "block_ratios", "plugin": "mine", "misalignment": 1.0, "selected": True}
    made |= {"dropped": False, "probe": False, "windows": 2}
    made["parameters"] = {"windows": 4, "of": [1, 2]}
    report = Report({}, "", {}, {"name": "x"}, [], None, candidates=[made])
    (row,) = report.candidate_records()
    assert row["windows"] == 2 and row["windows (parameter)"] == 4 and row["of"] == "[1, 2]"


def test_pandas_takes_them(report: Report) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is no dependency")
    frame = pandas.DataFrame(report.linear_records())
    assert len(frame) == 14 and frame["achieved"].between(0, 1).all()
    best = pandas.DataFrame(report.candidate_records()).groupby("role")["misalignment"].min()
    for role, chosen in report.selected().items():
        assert best[role] == chosen["misalignment"]
