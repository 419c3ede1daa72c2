"""`prune --evaluate` and `evaluate RUN`: what is shown, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neuroal.model import files

UNIFORM = ("--top-up", "uniform")


def ok(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return result


def rows(text: str) -> dict[str, str]:
    """The rows of a table of two columns."""
    pairs = (line.split("  ", 1) for line in text.splitlines() if "  " in line)
    return {key.strip(): value.strip() for key, value in pairs}


def test_a_run_shows_both_models(folder: Path, prune: Any, run: Any) -> None:
    given = ("--evaluate", "text.txt", "--evaluate", "rows.jsonl", "--evaluate-length", 16)
    shown = rows(ok(prune(*UNIFORM, *given, "--out", "out")).stdout)
    said = json.loads(Path("out/neuroal.json").read_text())
    assert said["recipe"]["evaluate"] == ["text.txt", "rows.jsonl"]
    for entry in said["evaluation"]:
        dense = json.loads(
            ok(run("evaluate", "tiny", "--data", entry["data"], "--length", 16, "--json")).stdout
        )
        assert entry["dense_perplexity"] == dense["perplexity"]
        assert shown[f"perplexity, {entry['data']}"] == (
            f"{entry['perplexity']:.4f}, dense {entry['dense_perplexity']:.4f} "
            f"({entry['difference']:+.4f}, excess {entry['excess']:.4f})"
        )
    again = ok(run("prune", "--recipe", "out/neuroal.json", "--out", "again", "--json"))
    assert json.loads(again.stdout)["evaluation"] == said["evaluation"]


def test_a_collapse_is_said(folder: Path, prune: Any, run: Any) -> None:
    """Of random weights no pruning is worse: the head is made one that knows the text."""
    given = ("--evaluate", "text.txt", "--evaluate-length", 16, "--sparsity", 0.6)
    ok(prune(*UNIFORM, *given, "--out", "out"))
    said = json.loads(Path("out/neuroal.json").read_text())
    assert said["evaluation"][0]["excess"] < 1
    said["evaluation"][0]["dense_perplexity"] = 2.0
    Path("out/neuroal.json").write_text(json.dumps(said))
    result = ok(run("evaluate", "out", "--data", "text.txt", "--length", 16))
    (note,) = [x for x in result.stdout.splitlines() if x.startswith("Note: ")]
    assert note.startswith("Note: the model has collapsed on 'text.txt': its perplexity of ")
    assert "times the dense model's 2.0" in note and "--effort high" in note
    kept = json.loads(Path("out/neuroal.json").read_text())["evaluation"]
    assert [x["dense_perplexity"] for x in kept] == [2.0] and kept[0]["excess"] > 1


def test_a_later_evaluation_is_kept_with_the_run(folder: Path, prune: Any, run: Any) -> None:
    ok(prune(*UNIFORM, "--evaluate", "text.txt", "--evaluate-length", 16, "--out", "out"))
    sha256 = files.fingerprint("out")
    known = json.loads(Path("out/neuroal.json").read_text())["evaluation"][0]
    result = ok(run("evaluate", "out", "--data", "text.txt", "--length", 16))
    shown = rows(result.stdout)
    assert shown["perplexity"] == f"{known['perplexity']:.4f}"
    dense, difference, excess = (known[x] for x in ("dense_perplexity", "difference", "excess"))
    assert shown["dense model"] == f"{dense:.4f} ({difference:+.4f}, excess {excess:.4f})"
    assert shown["kept in"] == "out/neuroal.json"
    other = ok(run("evaluate", "out", "--data", "text.txt", "--length", 8, "--json"))
    said = json.loads(other.stdout)
    assert said["kept_in"] == "out/neuroal.json" and "dense_perplexity" not in said
    kept = json.loads(Path("out/neuroal.json").read_text())["evaluation"]
    assert kept[0] == known
    assert (kept[1]["length"], kept[1]["perplexity"]) == (8, said["perplexity"])
    assert kept[1]["dense_perplexity"] is None
    assert "| `text.txt` | " in Path("out/README.md").read_text()
    assert files.fingerprint("out") == sha256
    ok(run("prune", "--recipe", "out/neuroal.json", "--out", "out", "--resume"))  # still finished
    quiet = ok(run("evaluate", "out", "--data", "text.txt", "--length", 16, "-q"))
    assert quiet.stdout == f"{known['perplexity']:.4f}\n"


def test_a_dense_model_keeps_nothing(folder: Path, run: Any) -> None:
    before = sorted(p.name for p in Path("tiny").iterdir())
    result = ok(run("evaluate", "tiny", "--data", "text.txt", "--length", 16, "--json"))
    assert "kept_in" not in json.loads(result.stdout)
    assert sorted(p.name for p in Path("tiny").iterdir()) == before


def test_compare_shows_what_is_kept(folder: Path, prune: Any, run: Any) -> None:
    given = ("--evaluate", "text.txt", "--evaluate-length", 16)
    ok(prune(*UNIFORM, *given, "--out", "a"))
    ok(prune("--pruner", "magnitude", *UNIFORM, *given, "--evaluate", "rows.jsonl", "--out", "b"))
    said = json.loads(ok(run("compare", "a", "b", "--json")).stdout)
    both, only = said["evaluation"]
    assert both["a"]["sha256"] == both["b"]["sha256"]
    assert both["a"]["dense_perplexity"] == both["b"]["dense_perplexity"]
    assert (only["a"], only["b"]["data"]) == (None, "rows.jsonl")
    text = ok(run("compare", "a", "b")).stdout
    (line,) = [x for x in text.splitlines() if x.startswith("perplexity, text.txt (float32)")]
    for side in "ab":
        entry = both[side]
        assert f"{entry['perplexity']:.4f} (excess {entry['excess']:.4f})" in line
    (line,) = [x for x in text.splitlines() if x.startswith("perplexity, rows.jsonl (float32)")]
    assert f"{only['b']['perplexity']:.4f}" in line


def test_a_number_of_another_dtype_is_said_to_be_one(folder: Path, prune: Any, run: Any) -> None:
    given = ("--evaluate", "text.txt", "--evaluate-length", 16)
    ok(prune(*UNIFORM, *given, "--out", "a"))
    text = ("--data", "text.txt", "--length", 16)
    said = ok(run("evaluate", "a", *text, "--dtype", "bfloat16")).stdout
    (entry,) = json.loads(Path("a/neuroal.json").read_text())["evaluation"][:1]
    dense = f"{entry['dense_perplexity']:.4f}"
    assert "dense model  " not in said
    assert (
        f"Note: the run has the dense model's {dense} by float32, not bfloat16: --dtype float32 "
        "measures alike" in said
    )
    assert "Note: " not in ok(run("evaluate", "a", *text, "--dtype", "float32")).stdout
    shown = ok(run("compare", "a", "a", *text, "--dtype", "bfloat16")).stdout
    assert "perplexity, text.txt (float32)" in shown and "perplexity, text.txt (bfloat16)" in shown
    (line,) = [x for x in shown.splitlines() if x.startswith("on ")]
    assert line.count("windows of 16") == line.count(", bfloat16") == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--evaluate", "gone.txt"), "no such file: source 'gone.txt' does not exist"),
        (("--evaluate-windows", 3), "evaluate_windows is for evaluate, which names no text"),
        (
            ("--evaluate", "text.txt", "--evaluate-length", 65),
            "more than the model's context of 64",
        ),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_what_is_refused(
    arguments: tuple[object, ...], says: str, dry: tuple[str, ...], folder: Path, prune: Any
) -> None:
    before = sorted(str(p) for p in folder.rglob("*"))
    result = prune(*UNIFORM, *arguments, *dry, "--out", "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ") and says in result.stderr
    assert sorted(str(p) for p in folder.rglob("*")) == before


def test_a_dry_run_counts_the_evaluation(folder: Path, prune: Any) -> None:
    given = ("--evaluate", "text.txt", "--evaluate", "wikitext2", "--evaluate", "owner/name")
    given = (*UNIFORM, *given, "--evaluate-length", 16, "--dry-run")
    said = json.loads(ok(prune(*given, "--json")).stdout)
    tokens = len("The quick brown fox. " * 40) // 16
    assert said["evaluation"] == [
        {"source": "text.txt", "windows": tokens, "length": 16},
        {"source": "wikitext2", "windows": 1_300_000 // 4 // 16, "length": 16},
        {"source": "owner/name", "windows": None, "length": 16},
    ]
    assert said["seconds"]["evaluate"] > said["seconds"]["prune"] > 0
    unread = "'owner/name' is read only by the run: its evaluation is not in the time"
    assert unread in said["notes"]
    text = ok(prune(*given)).stdout
    assert f"dense and pruned on {tokens} windows of 16 tokens from text.txt" in text
    assert "dense and pruned on all windows of 16 tokens from owner/name" in text
    assert f"Note: {unread}" in text
