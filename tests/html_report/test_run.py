"""The report of a run: its numbers are those of neuroal.json, its texts are escaped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file

from neuroal.escape import terminal
from neuroal.html_report import LARGEST, write
from neuroal.html_report.drawing import draw

Read = Callable[[Path], Any]
TITLES = [
    "Where the zeros are",
    "Search for block ratios",
    "Search for row ratios",
    "Ratios of the rows",
    "Activations, dense against pruned",
    "Time and memory",
]


@pytest.fixture(scope="module")
def page(run: Path, read: Read, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert write([run], out) == out.stat().st_size < LARGEST
    return read(out)


def figures(page: Any) -> dict[str, Any]:
    return {f.all("h3")[0].text: f for f in page.all("figure")}


def numbers(figure: Any) -> tuple[list[str], list[list[Any]]]:
    """Headers and rows of a figure's table, numbers in full."""
    table = figure.all("table")[0]
    rows = []
    for row in table.all("tbody")[0].all("tr"):
        cells = row.all("td")
        datas = [cell.all("data") for cell in cells]
        rows.append(
            [
                float(d[0].attributes["value"]) if d else c.text
                for c, d in zip(cells, datas, strict=True)
            ]
        )
    return [h.text for h in table.all("th")], rows


def tooltips(figure: Any) -> list[str]:
    """What marks of a chart say, without the name of the chart itself."""
    return [t.text for t in figure.all("svg")[0].all("title")[1:]]


def test_every_figure_is_there_with_a_text_alternative(page: Any) -> None:
    found = figures(page)
    assert list(found) == TITLES
    for title, figure in found.items():
        (svg,) = figure.all("svg")
        assert svg.attributes["role"] == "img"
        name, words = svg.attributes["aria-labelledby"].split()
        ids = {e.attributes.get("id"): e for e in (*svg.all("title"), *svg.all("desc"))}
        assert ids[name].text == title
        assert ids[words].text == figure.all("figcaption")[0].all("p")[0].text
        (numbers,) = figure.all("details")
        assert numbers.all("table") and numbers.all("summary")[0].text == "The numbers"


def test_the_map_shows_what_was_counted(page: Any, run: Path, report_of: Read) -> None:
    report = report_of(run)
    headers, rows = numbers(figures(page)["Where the zeros are"])
    assert headers == ["linear", "wanted", "achieved", "lowest row", "highest row"]
    assert rows == [
        [name, x["wanted"], x["achieved"], x["rows"]["min"], x["rows"]["max"]]
        for name, x in report["linears"].items()
    ]
    said = tooltips(figures(page)["Where the zeros are"])
    assert sorted(said) == sorted(
        f"block {name.split('.')[2]}, {name.split('.', 3)[3]}: {x['achieved']:.2%} pruned"
        for name, x in report["linears"].items()
    )


@pytest.mark.parametrize("role", ["block_ratios", "row_ratios"])
def test_the_search_shows_every_candidate(role: str, page: Any, run: Path, report_of: Read) -> None:
    figure = figures(page)[f"Search for {role.replace('_', ' ')}"]
    candidates = [c for c in report_of(run)["candidates"] if c["role"] == role]
    _, rows = numbers(figure)
    assert [row[2] for row in rows] == [c["misalignment"] for c in candidates]
    assert [row[3] for row in rows] == [
        "chosen" if c["selected"] else "measured" for c in candidates
    ]
    assert [row[1] for row in rows] == [f"λ = {c['parameters']['lam']:g}" for c in candidates]
    chosen = next(c for c in candidates if c["selected"])
    (mark,) = [t for t in tooltips(figure) if t.endswith("(chosen)")]
    assert f"λ = {chosen['parameters']['lam']:g}: {chosen['misalignment']:.6g}" in mark
    assert len(tooltips(figure)) == len(candidates)


def test_what_was_evaluated_is_shown(run: Path, read: Read, tmp_path: Path) -> None:
    folder = tmp_path / "evaluated"
    shutil.copytree(run, folder)
    report = json.loads((folder / "neuroal.json").read_text())
    one = {"data": "a/text.txt", "windows": 3, "length": 16, "sha256": "ab" * 32}
    one |= {"dtype": "float32", "protocol": "p", "perplexity": 40.0}
    beside = {"dense_perplexity": 10.0, "difference": 30.0, "excess": 1.3862943611198906}
    alone = dict.fromkeys(beside) | {"data": "ptb", "perplexity": "inf"}
    task = {"acc": 0.625, "metric": "acc", "examples": 9}
    zero_shot = {"tasks": {"rte": task}, "accuracy": 0.625, "harness": "lm-eval 0.4"}
    zero_shot |= {"limit": None, "dtype": "float32"}
    report |= {"evaluation": [one | beside, one | alone], "zero_shot": [zero_shot]}
    (folder / "neuroal.json").write_text(json.dumps(report))
    write([folder], tmp_path / "report.html")
    text = read(tmp_path / "report.html").text
    assert "Perplexity on text.txt 40 dense 10, excess 1.39" in text
    assert "Perplexity on ptb inf" in text
    assert "the model has collapsed on 'text.txt': its perplexity of 40.0 is 4.0 times" in text
    for word in ("Evaluation", "3 of 16 tokens", "1.38629", "ababababab", "Zero-shot tasks", "rte"):
        assert word in text, word


def test_rows_are_those_of_the_allocation(page: Any, run: Path) -> None:
    _, rows = numbers(figures(page)["Ratios of the rows"])
    tensors = load_file(run / "allocation.safetensors")
    for kind, count, *quantiles in rows:
        ratios = np.concatenate([t for name, t in tensors.items() if name.endswith(f".{kind}")])
        assert count == len(ratios)
        assert quantiles == np.quantile(ratios, [0, 0.05, 0.5, 0.95, 1]).tolist()
    assert sum(row[1] for row in rows) == sum(len(t) for t in tensors.values())


def test_norms_are_means_over_the_linears_of_a_block(page: Any, run: Path, report_of: Read) -> None:
    report = report_of(run)
    _, rows = numbers(figures(page)["Activations, dense against pruned"])
    assert [row[0] for row in rows] == [0, 1, 2]
    for block, dense, pruned, share in rows:
        norms = [
            x["input_norm"] for n, x in report["linears"].items() if f"layers.{int(block)}." in n
        ]
        assert len(norms) == 7
        assert dense == pytest.approx(sum(n["dense"] for n in norms) / 7)
        if block == 2:
            assert (pruned, share) == ("–", "–")
        else:
            assert pruned == pytest.approx(sum(n["pruned"] for n in norms) / 7)
            assert share == pytest.approx(pruned / dense)


def test_time_and_memory_of_every_phase(page: Any, run: Path, report_of: Read) -> None:
    report = report_of(run)
    _, rows = numbers(figures(page)["Time and memory"])
    assert rows == [[p, t, report["phase_memory_bytes"][p]] for p, t in report["timings"].items()]


def test_recipe_plugins_and_provenance(page: Any, run: Path, report_of: Read) -> None:
    report = report_of(run)
    text = page.text
    assert f"neuroal prune --recipe {run}" in text
    for key in ("sha256", "recipe_sha256"):
        assert (report[key] if key in report else report["model"][key]) in text
    rows = {
        r.all("th")[0].text: r.all("td")[0].text
        for r in page.all("tr")
        if r.all("th")[:1] and len(r.all("td")) == 1
    }
    assert rows["sparsity"] == "0.6" and rows["pruner"] == "wanda" and rows["seed"] == "0"
    assert json.loads(rows["options"]) == report["recipe"]["options"]
    for plugin in report["plugins"]:
        assert plugin["name"] in text and plugin["sha256"][:12] in text
    assert (
        page.all("title")[0].text == page.all("h1")[0].text == "some/llama, wanda + neuroal, 60.0%"
    )


def test_the_file_stands_alone(run: Path, tmp_path: Path, read: Read) -> None:
    write([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?:|@import|<script|javascript:", text)
    page = read(tmp_path / "report.html")
    for element in [e for tag in ("a", "link", "use") for e in page.all(tag)]:
        assert element.attributes["href"].startswith(("#", "data:"))
    for tag in ("img", "iframe", "object", "script", "video"):
        assert page.all(tag) == []
    references = re.findall(r"url\(([^)]*)\)", text)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert {r.removeprefix("#") for r in references} <= set(ids)
    policy = [m for m in page.all("meta") if m.attributes.get("http-equiv")]
    assert policy[0].attributes["content"].startswith("default-src 'none'")


def test_one_page_for_several_runs_repeats_to_the_byte(
    run: Path, prune: Callable[..., Path], tmp_path: Path, read: Read
) -> None:
    other = prune("uniform", top_up="uniform", pruner="magnitude")
    write([run, other], tmp_path / "a.html", title="Two & more")
    write([run, other], tmp_path / "b.html", title="Two & more")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    page = read(tmp_path / "a.html")
    assert page.all("h1")[0].text == "Two & more"
    sections = [s for s in page.all("section") if s.attributes.get("class") == "subject"]
    links = page.all("nav")[0].all("a")
    assert [a.attributes["href"] for a in links] == [f"#{s.attributes['id']}" for s in sections]
    assert [a.text for a in links] == [s.all("h2")[0].text for s in sections]
    captions = {t: f.all("figcaption")[0].text for t, f in figures(sections[1]).items()}
    assert "ran no block" in captions["Activations, dense against pruned"]
    assert "'uniform' proposes one allocation" in captions["Search for block ratios"]
    assert not figures(sections[1])["Search for block ratios"].all("svg")


HOSTILE = "<script>alert('λ')</script>&\"x"


def hostile(value: Any, key: str = "") -> Any:
    """The same report with every free text replaced."""
    if isinstance(value, dict):
        return {k: hostile(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v, key) for v in value]
    names = {"name", "plugin", "distribution", "model", "pruner", "platform", "source"}
    return HOSTILE if key in names and isinstance(value, str) else value


def test_names_are_text_whatever_they_hold(
    run: Path, report_of: Read, read: Read, tmp_path: Path
) -> None:
    folder = tmp_path / "a <b>"
    folder.mkdir()
    report = report_of(run)
    evil = hostile(report)
    evil["notes"] = [HOSTILE]
    evil["blocks"] = report["blocks"]
    evil["linears"] = {f"{name}.{HOSTILE}": x for name, x in report["linears"].items()}
    evil["timings"] = {HOSTILE: 1.0}
    evil["recipe"]["options"] = {HOSTILE: {HOSTILE: HOSTILE}}
    for candidate in evil["candidates"]:
        candidate["parameters"] = {HOSTILE: HOSTILE}
    (folder / "neuroal.json").write_text(json.dumps(evil), encoding="utf-8")
    write([folder], tmp_path / "report.html", title=HOSTILE)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<b>" not in text
    page = read(tmp_path / "report.html")
    assert page.all("script") == []
    assert page.all("h1")[0].text == HOSTILE
    assert HOSTILE in page.all("figure")[0].all("svg")[0].text


def test_a_report_alone_shows_what_it_holds(run: Path, read: Read, tmp_path: Path) -> None:
    """Without the allocation, and as written before norms and memory were recorded."""
    report = json.loads((run / "neuroal.json").read_text())
    del report["phase_memory_bytes"]
    for x in report["linears"].values():
        del x["input_norm"]
    (tmp_path / "neuroal.json").write_text(json.dumps(report))
    write([tmp_path / "neuroal.json"], tmp_path / "report.html")
    found = figures(read(tmp_path / "report.html"))
    missing = [t for t in TITLES if not found[t].all("svg")]
    assert missing == ["Ratios of the rows", "Activations, dense against pruned"]
    assert len(found["Time and memory"].all("svg")) == 1


def test_dropped_candidates_and_probes_are_told_apart(
    run: Path, read: Read, tmp_path: Path
) -> None:
    report = json.loads((run / "neuroal.json").read_text())
    first, second, third = (c for c in report["candidates"] if c["role"] == "block_ratios")
    for candidate in (first, second, third):
        candidate["selected"] = False
    first["dropped"], second["probe"], third["selected"] = True, True, True
    (tmp_path / "neuroal.json").write_text(json.dumps(report))
    write([tmp_path], tmp_path / "report.html")
    figure = figures(read(tmp_path / "report.html"))["Search for block ratios"]
    assert [row[3] for row in numbers(figure)[1]] == ["dropped early", "probe", "chosen"]
    marks = tooltips(figure)
    assert any("at least" in m and m.endswith("(dropped early)") for m in marks)
    legend = figure.all("svg")[0].text
    assert all(word in legend for word in ("dropped early", "probe", "chosen"))
    assert "1 of them dropped early" in figure.all("figcaption")[0].text


def test_experts_share_a_row_of_the_map(run: Path, read: Read, tmp_path: Path) -> None:
    report = json.loads((run / "neuroal.json").read_text())
    linears = report["linears"]
    for name in [n for n in linears if n.endswith("down_proj")]:
        x = linears.pop(name)
        for expert in range(60):
            share = expert / 59
            expert_name = name.replace("mlp.", f"mlp.experts.{expert}.")
            linears[expert_name] = x | {"achieved": share}
    (tmp_path / "neuroal.json").write_text(json.dumps(report))
    write([tmp_path], tmp_path / "report.html")
    figure = figures(read(tmp_path / "report.html"))["Where the zeros are"]
    headers, rows = numbers(figure)
    assert headers == ["linear", "block", "achieved"] and len(rows) == 3 * 7
    merged = [row for row in rows if row[0] == "mlp.experts.*.down_proj"]
    assert [row[1] for row in merged] == [0, 1, 2]
    assert all(row[2] == pytest.approx(0.5) for row in merged)


def test_many_blocks_take_the_whole_width(run: Path, read: Read, tmp_path: Path) -> None:
    report = json.loads((run / "neuroal.json").read_text())
    block = {n: x for n, x in report["linears"].items() if ".layers.0." in n}
    report["blocks"] = [{"name": f"model.layers.{i}", "achieved": 0.6} for i in range(80)]
    report["linears"] = {
        n.replace(".0.", f".{i}.", 1): x for i in range(80) for n, x in block.items()
    }
    (tmp_path / "neuroal.json").write_text(json.dumps(report))
    assert write([tmp_path], tmp_path / "report.html") < LARGEST
    page = read(tmp_path / "report.html")
    figure = figures(page)["Where the zeros are"]
    assert figure.attributes["class"] == "wide"
    assert len(tooltips(figure)) == 80 * 7


def test_a_drawing_of_what_xml_cannot_hold() -> None:
    for text in ("\x1b[31m", "\x01", "\uffff", "\x85"):
        values = [{"name": f"a{text}b", "value": 1}]
        encoding = {"x": {"field": "name", "type": "nominal"}, "y": {"field": "value"}}
        spec = {"data": {"values": values}, "mark": "bar", "encoding": encoding}
        drawn = ElementTree.fromstring(draw(spec, "one", "title", "words"))
        assert f"a{terminal(text)}b" in "".join(drawn.itertext())
