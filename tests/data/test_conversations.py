"""Chat data in the forms that people have it in, through the model's own chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neuroal.data.calibration import calibration_windows
from neuroal.errors import NeuroalError
from neuroal.evaluation.perplexity import evaluation_windows

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
)
ASKED, SAID = "how far is it", "two hours on foot"
TEXT = f"[user]{ASKED}</s>[assistant]{SAID}</s>"
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
SHARED = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": TURNS}, TEXT),
    "messages of ShareGPT": ({"messages": SHARED}, TEXT),
    "conversations": ({"conversations": SHARED}, TEXT),
    "conversations of roles": ({"conversations": TURNS}, TEXT),
    "prompt, completion": ({"prompt": ASKED, "completion": SAID}, TEXT),
    "both messages": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TEXT),
    "prompt, response": ({"response": SAID, "prompt": ASKED}, TEXT),
    "instruction": ({"instruction": ASKED, "output": SAID}, TEXT),
    "no input": ({"instruction": ASKED, "input": "", "output": SAID}, TEXT),
    "input": (
        {"instruction": "Be brief.", "input": ASKED, "output": SAID},
        f"[user]Be brief.\n\n{ASKED}</s>[assistant]{SAID}</s>",
    ),
    "other columns": ({"id": 7, "messages": TURNS, "source": "web"}, TEXT),
}


def expected_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text of characters and `</s>`, looked up one by one."""
    ids: list[int] = []
    while text:
        size = 4 if text.startswith("</s>") else 1
        ids.append(tokenizer.convert_tokens_to_ids(text[:size]))
        text = text[size:]
    return ids


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({key: [row[key] for row in rows] for key in rows[0]}))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def same_tokens(path: str, tokenizer: Any, text: str) -> bool:
    """Whether an evaluation reads the tokens of the text; an odd one at the end it leaves out."""
    found = evaluation_windows(path, tokenizer, length=2)
    ids = expected_ids(text, tokenizer)
    return [token for window in found.ids.tolist() for token in window] == ids[: len(ids) // 2 * 2]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_rendered_by_the_template(
    form: str, suffix: str, tmp_path: Path, characters: Any
) -> None:
    row, text = FORMS[form]
    tokenizer = characters(template=TEMPLATE)
    path = write(tmp_path / f"x{suffix}", [row, row])
    assert same_tokens(path, tokenizer, 2 * text)


def test_a_column_of_lists_by_key_is_a_conversation(tmp_path: Path, characters: Any) -> None:
    """As `datasets` gives a sequence of structures."""
    turns = {"from": ["human", "gpt"], "value": [ASKED, SAID]}
    path = write(tmp_path / "x.jsonl", [{"conversations": turns}])
    tokenizer = characters(template=TEMPLATE)
    assert same_tokens(path, tokenizer, TEXT)


def test_a_column_of_any_name_may_hold_messages(tmp_path: Path, characters: Any) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "not read", "dialog": TURNS}])
    tokenizer = characters(template=TEMPLATE)
    assert same_tokens(f"{path}:dialog", tokenizer, TEXT)


def test_text_and_token_ids_go_first(tmp_path: Path, characters: Any) -> None:
    tokenizer = characters(template=TEMPLATE)
    texts = write(tmp_path / "x.jsonl", [{"messages": TURNS, "text": "plain"}])
    assert same_tokens(texts, tokenizer, "plain")
    rows = write(tmp_path / "y.jsonl", [{"messages": TURNS, "text": "plain", "input_ids": [5, 6]}])
    assert evaluation_windows(rows, tokenizer).ids.tolist() == [[5, 6]]


def test_what_else_a_message_has_reaches_the_template(tmp_path: Path, characters: Any) -> None:
    """Parquet gives every message all keys; those without a value are not there."""
    template = "{% for m in messages %}{{ m.name if m.name is defined else '-' }}{% endfor %}"
    rows = [{"messages": [{**TURNS[0], "name": "Ada"}, {**TURNS[1], "name": None}]}] * 2
    tokenizer = characters(template=template)
    for suffix in (".jsonl", ".parquet"):
        path = write(tmp_path / f"x{suffix}", rows)
        assert same_tokens(path, tokenizer, "Ada-</s>Ada-</s>")


def test_a_token_of_the_template_is_not_there_twice(tmp_path: Path, characters: Any) -> None:
    tokenizer = characters(adds=True, template="{{ bos_token }}" + TEMPLATE)
    path = write(tmp_path / "x.jsonl", [FORMS["messages"][0]])
    text = "~" + TEXT
    found = evaluation_windows(path, tokenizer, length=len(expected_ids(text, tokenizer)))
    assert found.ids.tolist() == [expected_ids(text, tokenizer)]


def test_conversations_calibrate(tmp_path: Path, characters: Any) -> None:
    tokenizer = characters(template=TEMPLATE)
    path = write(tmp_path / "x.jsonl", [FORMS["messages"][0]] * 3)
    found = calibration_windows(path, tokenizer, samples=2, length=10)
    ids = expected_ids(TEXT, tokenizer)
    assert found.ids.tolist() == [ids[:10], ids[10:20]]  # all three are the same
    assert found.packed and found.documents == 1
    assert found.notes == (
        "windows come from 1 of 3 conversations, rendered by the model's chat template, "
        "joined by '</s>'",
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": "hello"}, "'{}'"),
        ({"messages": []}, "row 1 of '{}' is a conversation without messages"),
        (
            {"messages": [{"role": "critic", "content": "x"}]},
            "row 1 of '{}' is refused.*no critics",
        ),
        (
            {"messages": [{"speaker": "a"}]},
            "row 1 of '{}' has the message .*write role and content",
        ),
        ({"messages": [{"from": "who", "value": "x"}]}, "row 1 of '{}' .* from 'who', none of sys"),
        ({"prompt": ASKED, "completion": None}, "row 1 of '{}' has None in column 'completion'"),
        ({"instruction": ASKED, "output": 5}, "row 1 of '{}' has 5 in column 'output', not text"),
    ],
)
def test_a_row_that_is_no_conversation_is_one_line(
    row: dict[str, Any], says: str, tmp_path: Path, characters: Any
) -> None:
    path = write(tmp_path / "x.jsonl", [row])
    with pytest.raises(NeuroalError, match=says.format(path)) as raised:
        calibration_windows(path, characters(template=TEMPLATE), samples=1, length=64)
    assert "\n" not in str(raised.value)


def test_without_a_template_the_way_is_said(tmp_path: Path, characters: Any) -> None:
    for name in ("messages", "prompt, completion"):
        path = write(tmp_path / "x.jsonl", [FORMS[name][0]])
        for take in (calibration_windows, evaluation_windows):
            options = {"samples": 1} if take is calibration_windows else {}
            with pytest.raises(NeuroalError, match=r"chat_template\.jinja") as raised:
                take(path, characters(), length=8, **options)
            assert f"holds conversations ({name})" in str(raised.value)
            assert "or give texts in a column 'text'" in str(raised.value)


def test_columns_that_differ_in_length_are_refused(tmp_path: Path, characters: Any) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"prompt": ["a", "b"], "completion": ["c"]}))
    with pytest.raises(NeuroalError, match="differ in length: prompt 2, completion 1"):
        calibration_windows(str(path), characters(template=TEMPLATE), samples=1)
