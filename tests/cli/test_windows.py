"""Text as people have it, from the command line: what windows begin with, chat, short documents."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from neuroal.testing import tiny_tokenizer

TEXT = "The quick brown fox. " * 40  # the folder's text.txt
FEW = ("--length", 16, "--samples", 4, "--search-samples", 1, "--top-up", "uniform")
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"


@pytest.fixture
def begun(folder: Path) -> Path:
    """The folder, whose model now has a tokenizer that begins a text with `~`, its bos token."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "~"
    token = tokenizer.convert_tokens_to_ids("~")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="~ $A", special_tokens=[("~", token)]
    )
    tokenizer.save_pretrained("tiny")
    return folder


def sha256(windows: Sequence[Sequence[int]]) -> str:
    tokens = [token for window in windows for token in window]
    return hashlib.sha256(struct.pack(f"<{len(tokens)}q", *tokens)).hexdigest()


def ids_of(text: str) -> list[int]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.convert_tokens_to_ids(character) for character in text]


def drawn(tokens: Sequence[int], samples: int = 4, length: int = 16) -> list[list[int]]:
    """Random windows of one document, by hand."""
    rng, windows = random.Random(0), []
    for _ in range(samples):
        rng.randrange(1)
        start = rng.randint(0, len(tokens) - length - 1)
        windows.append(list(tokens[start : start + length]))
    return windows


def with_token(windows: Sequence[list[int]]) -> list[list[int]]:
    return [w if w[0] == 95 else [95, *w[:-1]] for w in windows]


def report(out: str = "out") -> dict[str, Any]:
    value: dict[str, Any] = json.loads(Path(out, "neuroal.json").read_text())
    return value


def ok(result: Any) -> str:
    assert result.exit_code == 0, result.stderr
    text: str = result.stdout
    return text


def fails(result: Any, status: int) -> str:
    assert result.exit_code == status, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    text: str = result.stderr
    return text


SAYS = "every window begins with '~', as the tokenizer begins a text (--bos auto)"


def test_auto_follows_the_tokenizer(begun: Path, run: Any) -> None:
    tokens = [95, *ids_of(TEXT)]
    given = ("prune", "tiny", "--calibration", "text.txt", *FEW)
    said = ok(run(*given, "--out", "out"))
    assert f"Note: {SAYS}" in said
    data = report()["data"]
    assert data["bos"] == "~" and data["length"] == 16 and data["windows"] == 4
    assert data["sha256"] == sha256(with_token(drawn(tokens)))
    assert SAYS in report()["notes"]
    card = Path("out/README.md").read_text()
    assert "calibration: 4 windows of 16 tokens, each begun with '~', from `text.txt`" in card
    ok(run(*given, "--bos", "never", "--out", "without"))
    data = report("without")["data"]
    assert data["bos"] is None and data["sha256"] == sha256(drawn(tokens))
    assert report("without")["recipe"]["bos"] == "never"
    assert "begins with" not in "".join(report("without")["notes"])


def test_a_tokenizer_that_adds_nothing_gives_the_windows_of_before(folder: Path, run: Any) -> None:
    given = ("prune", "tiny", "--calibration", "text.txt", *FEW)
    ok(run(*given, "--out", "out"))
    assert report()["data"]["sha256"] == sha256(drawn(ids_of(TEXT)))
    assert report()["data"]["bos"] is None
    said = fails(run(*given, "--bos", "always", "--out", "other"), 2)
    assert "has no beginning-of-sequence token: give --bos never" in said
    assert not Path("other").exists() and not Path("other.partial").exists()


def test_the_papers_budget_keeps_the_published_windows(begun: Path, run: Any) -> None:
    given = ("prune", "tiny", "--calibration", "text.txt", *FEW, "--budget", "paper")
    tokens = [95, *ids_of(TEXT)]
    ok(run(*given, "--out", "out"))
    assert report()["data"]["sha256"] == sha256(drawn(tokens))
    ok(run(*given, "--bos", "always", "--out", "always"))
    assert report("always")["data"]["sha256"] == sha256(with_token(drawn(tokens)))


def test_a_dry_run_says_what_windows_begin_with(begun: Path, run: Any) -> None:
    given = ("prune", "tiny", "--calibration", "text.txt", *FEW, "--dry-run")
    said = ok(run(*given))
    assert "4 windows of 16 tokens, each begun with '~', from text.txt" in said
    assert f"Note: {SAYS}" in said
    plan = json.loads(ok(run(*given, "--json")))
    assert plan["data"]["bos"] == "~" and SAYS in plan["notes"]
    assert plan["data"]["sha256"] == sha256(with_token(drawn([95, *ids_of(TEXT)])))
    assert "begins with" not in ok(run(*given, "--bos", "never"))
    # A data set of the hub is not read; what windows will begin with is known all the same.
    assert f"Note: {SAYS}" in ok(run("prune", "tiny", "--calibration", "c4", *FEW, "--dry-run"))


def test_token_ids_are_taken_as_they_are(begun: Path, run: Any) -> None:
    rows = [json.loads(line)["input_ids"] for line in Path("rows.jsonl").read_text().splitlines()]
    given = ("prune", "tiny", "--calibration", "rows.jsonl", *FEW)
    ok(run(*given, "--out", "out"))
    assert report()["data"]["sha256"] == sha256(rows[:4]) and report()["data"]["bos"] is None
    ok(run(*given, "--bos", "always", "--out", "always"))
    assert report("always")["data"]["sha256"] == sha256(with_token(rows[:4]))
    assert report("always")["data"]["length"] == 16
    said = fails(run(*given, "--pack-documents", "--out", "packed"), 2)
    assert "'rows.jsonl' holds rows of token ids, which are taken as they are" in said


def test_a_wrong_rule_is_refused(folder: Path, run: Any) -> None:
    result = run("prune", "tiny", "--bos", "sometimes")
    assert result.exit_code == 2 and "'auto', 'always', 'never'" in result.stderr
    Path("recipe.json").write_text(json.dumps({"model": "tiny", "bos": "sometimes"}))
    assert "bos='sometimes' is not auto or always or never" in fails(
        run("prune", "--recipe", "recipe.json"), 2
    )


def test_a_recorded_run_is_repeated_and_a_resumed_one_is_the_same(begun: Path, run: Any) -> None:
    ok(run("prune", "tiny", "--calibration", "text.txt", *FEW, "--out", "out"))
    ok(run("prune", "--recipe", "out/neuroal.json", "--out", "again"))
    assert report("again")["data"] == report()["data"]
    given = ("prune", "--recipe", "out/neuroal.json", "--out", "out", "--resume")
    ok(run(*given))
    for change, key in ((("--bos", "never"), "bos"), (("--pack-documents",), "pack_documents")):
        assert f"holds another run: {key} is " in fails(run(*given, *change), 2)
    # A run from before windows could begin with the token is repeated without.
    early = report()
    del early["recipe"]["bos"], early["recipe"]["pack_documents"]
    Path("early.json").write_text(json.dumps(early))
    ok(run("prune", "--recipe", "early.json", "--out", "early"))
    assert report("early")["data"]["sha256"] == sha256(drawn([95, *ids_of(TEXT)]))


def test_evaluate_says_its_protocol(begun: Path, run: Any) -> None:
    ids = ids_of(TEXT)
    given = ("evaluate", "tiny", "--data", "text.txt", "--length", 16)
    found = json.loads(ok(run(*given, "--json")))
    cut = [[95, *ids[n : n + 15]] for n in range(0, len(ids) // 15 * 15, 15)]
    assert found["bos"] == "~" and found["sha256"] == sha256(cut)
    assert "cut into consecutive windows, each begun with '~'" in found["protocol"]
    assert f"{len(cut)} of 16 tokens, each begun with '~'" in ok(run(*given))
    before = json.loads(ok(run(*given, "--bos", "never", "--json")))
    published = [95, *ids]
    cut = [published[n : n + 16] for n in range(0, len(published) // 16 * 16, 16)]
    assert before["bos"] is None and before["sha256"] == sha256(cut)
    assert before["perplexity"] != found["perplexity"]
    said = fails(run("evaluate", "tiny", "--tasks", "rte", "--bos", "never"), 2)
    assert "--bos is for --data, which is not given" in said


def test_compare_measures_both_alike(begun: Path, run: Any) -> None:
    for pruner in ("wanda", "magnitude"):
        ok(run("prune", "tiny", "--calibration", "rows.jsonl", *FEW, "--pruner", pruner,
               "--out", pruner))  # fmt: skip
    given = ("compare", "wanda", "magnitude", "--data", "text.txt", "--length", 16)
    assert "windows of 16, each begun with '~'" in ok(run(*given))
    found = json.loads(ok(run(*given, "--bos", "never", "--json")))["perplexity"]
    assert found["a"]["bos"] is None and found["a"]["sha256"] == found["b"]["sha256"]


# -- chat data ---------------------------------------------------------------------------------


def write(name: str, rows: Sequence[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def chats(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"is {n} even"},
                {"role": "tool", "content": "?"},
            ]
        }
        for n in range(count)
    ]


def test_chat_data_is_rendered_and_packed(folder: Path, run: Any) -> None:
    write("chat.jsonl", chats())
    Path("tiny/chat_template.jinja").write_text(TEMPLATE)
    order = random.Random(0).sample(range(12), 12)
    texts = [[f"[user]is {n} even", "[tool]?"] for n in order]
    tokens = [t for parts in texts for part in parts for t in (*ids_of(part), 1)]
    given = ("prune", "tiny", "--calibration", "chat.jsonl", *FEW)
    note = "conversations, rendered by the model's chat template, joined by '</s>'"
    assert note in ok(run(*given, "--dry-run"))
    assert note in ok(run(*given, "--out", "out"))
    data = report()["data"]
    assert data["packed"] and data["sha256"] == sha256(
        [tokens[n : n + 16] for n in (0, 16, 32, 48)]
    )
    ok(run(*given, "--no-pack-documents", "--out", "alone"))
    assert not report("alone")["data"]["packed"]
    found = json.loads(ok(run("evaluate", "out", "--data", "chat.jsonl", "--length", 8, "--json")))
    assert "12 conversations rendered by the model's chat template" in found["protocol"]


@pytest.mark.parametrize("more", [("--dry-run",), ("--out", "out")])
def test_chat_data_without_a_template_is_refused(
    more: tuple[str, ...], folder: Path, run: Any
) -> None:
    write("chat.jsonl", [{"instruction": "Count.", "input": "", "output": "1 2 3"}])
    said = fails(run("prune", "tiny", "--calibration", "chat.jsonl", *FEW, *more), 1)
    assert "'chat.jsonl' holds conversations (instruction, output, input)" in said
    assert "put one into the model's folder (chat_template.jinja)" in said
    assert not Path("out").exists() and not Path("out.partial").exists()
    said = fails(run("evaluate", "tiny", "--data", "chat.jsonl"), 1)
    assert "has no chat template" in said


def test_a_dry_run_looks_at_the_column(folder: Path, run: Any) -> None:
    write("x.jsonl", [{"body": "The quick brown fox jumps over it."}])
    given = ("prune", "tiny", *FEW, "--dry-run", "--calibration")
    said = fails(run(*given, "x.jsonl"), 1)
    assert "has no column 'text' or 'input_ids', and none of chat data (messages, " in said
    assert said.endswith("its columns are body: say which to read, as 'x.jsonl:COLUMN'\n")
    assert "no column 'bodi': did you mean 'body'?" in fails(run(*given, "x.jsonl:bodi"), 1)
    ok(run(*given, "x.jsonl:body"))


# -- short documents ---------------------------------------------------------------------------


def test_short_documents_are_counted_in_plan_and_report(folder: Path, run: Any) -> None:
    write("x.jsonl", [{"text": "too short"}] * 50 + [{"text": TEXT}])
    given = ("prune", "tiny", "--calibration", "x.jsonl", *FEW[:2], "--samples", 128, *FEW[4:])
    note = (
        "50 of 51 documents are too short for a window of 16 tokens; windows come from 1 document"
    )
    assert note in ok(run(*given, "--dry-run"))
    assert note in ok(run(*given, "--out", "out"))
    assert any(note in line for line in report()["notes"])
    assert note in Path("out/README.md").read_text()
    assert report()["data"]["documents"] == 1
    ok(run(*given, "--pack-documents", "--out", "packed"))
    assert report("packed")["data"]["documents"] == 51
    card = Path("packed/README.md").read_text()
    assert "128 windows of 16 tokens from packed documents of `x.jsonl`" in card


@pytest.mark.parametrize("more", [("--dry-run",), ("--out", "out")])
def test_too_few_tokens_in_all_stays_an_error(
    more: tuple[str, ...], folder: Path, run: Any
) -> None:
    write("x.jsonl", [{"text": "short"}] * 2)
    given = ("prune", "tiny", "--calibration", "x.jsonl", *FEW, *more)
    assert "no document of 'x.jsonl' is longer than 16 tokens" in fails(run(*given), 1)
    said = fails(run(*given, "--pack-documents"), 1)
    assert "have 12 tokens, fewer than one window of 16: give more text, or --length 8" in said
    assert not Path("out").exists()
