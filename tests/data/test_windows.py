"""What windows begin with: the rule, by what the tokenizer does, and both ways of cutting."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from neuroal.data.calibration import calibration_windows
from neuroal.data.windows import Beginning, beginning, begun, consecutive
from neuroal.errors import UsageError
from neuroal.evaluation.perplexity import evaluation_windows

TILDE = Beginning("~", 95)  # the 94th of the printable characters, after <unk> and </s>


def ids_of(text: str, characters: Any) -> list[int]:
    """Token ids, without what the tokenizer adds."""
    return [characters().convert_tokens_to_ids(character) for character in text]


@pytest.mark.parametrize(
    ("adds", "bos", "rule", "expected"),
    [
        (True, "~", "auto", TILDE),
        (True, "~", "always", TILDE),
        (True, "~", "never", None),
        (False, "~", "auto", None),  # it has the token, and does not begin texts with it
        (False, "~", "always", TILDE),
        (False, "~", "never", None),
        (False, None, "auto", None),
        (True, None, "auto", None),  # what it begins texts with is not called so
        (False, None, "never", None),
    ],
)
def test_auto_is_what_the_tokenizer_does(
    adds: bool, bos: str | None, rule: Any, expected: Beginning | None, characters: Any
) -> None:
    assert beginning(characters(adds=adds, bos=bos), rule) == expected


def test_a_setting_of_the_tokenizer_is_not_believed(characters: Any) -> None:
    silent = characters(adds=False)
    silent.init_kwargs["add_bos_token"] = True
    assert beginning(silent, "auto") is None


def test_always_needs_a_token(characters: Any) -> None:
    with pytest.raises(UsageError, match="has no beginning-of-sequence token: give --bos never"):
        beginning(characters(bos=None), "always")
    with pytest.raises(UsageError, match="has no tokenizer, so no beginning-of-sequence token"):
        beginning(None, "always")
    assert beginning(None, "auto") is None


def test_a_window_is_as_long_with_the_token_as_without() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [95, 6, 7, 8]])
    assert begun(ids, TILDE).tolist() == [[95, 5, 6, 7], [95, 6, 7, 8]]
    assert begun(ids, None) is ids


def test_consecutive_windows_leave_no_token_out_and_never_have_the_token_twice() -> None:
    tokens = [95, 1, 2, 3, 4, 5, 95, 6, 7, 8, 9]
    # The first window has its own; [4, 5, 95] follow a new one; [6, 7, 8] too; 9 is dropped.
    expected = [[95, 1, 2, 3], [95, 4, 5, 95], [95, 6, 7, 8]]
    assert consecutive(tokens, 4, TILDE) == expected
    assert consecutive(tokens, 4, TILDE, most=2) == expected[:2]
    assert consecutive(tokens, 4, None) == [[95, 1, 2, 3], [4, 5, 95, 6]]
    assert consecutive([1, 2], 3, TILDE) == [[95, 1, 2]]  # exactly one window
    assert consecutive([1, 2], 3, None) == []


def test_calibration_windows_are_drawn_as_without_the_token(
    tmp_path: Path, characters: Any
) -> None:
    texts = ["abcdefghijklmnop" * n for n in (1, 2, 3)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = [[95, *ids_of(text, characters)] for text in texts]  # with it, documents begin anyway
    rng, drawn = random.Random(3), []
    for _ in range(20):
        while len(document := tokens[rng.randrange(3)]) <= 12:
            pass
        start = rng.randint(0, len(document) - 12 - 1)
        drawn.append(document[start : start + 12])
    tokenizer = characters(adds=True)
    common = {"samples": 20, "length": 12, "seed": 3}
    without = calibration_windows(str(path), tokenizer, **common, bos="never")
    assert without.ids.tolist() == drawn
    assert without.bos is None and not without.notes
    for rule in ("auto", "always"):
        found = calibration_windows(str(path), tokenizer, **common, bos=rule)
        expected = [x if x[0] == 95 else [95, *x[:-1]] for x in drawn]
        assert found.ids.tolist() == expected
        assert found.bos == "~" and found.to_json()["bos"] == "~"
        assert (
            f"(--bos {rule})" in found.notes[0] and "every window begins with '~'" in found.notes[0]
        )
    assert any(x[0] != 95 for x in drawn)
    silent = calibration_windows(str(path), characters(), **common)
    assert silent.bos is None


def test_evaluation_windows_hold_the_whole_text_behind_the_token(
    tmp_path: Path, characters: Any
) -> None:
    text = "".join(chr(97 + n % 26) for n in range(40))
    (tmp_path / "x.txt").write_text(text)
    ids = ids_of(text, characters)
    source, tokenizer = str(tmp_path / "x.txt"), characters(adds=True)
    found = evaluation_windows(source, tokenizer, length=10)
    assert found.ids.tolist() == [[95, *ids[n : n + 9]] for n in (0, 9, 18, 27)]
    assert found.protocol.endswith("cut into consecutive windows, each begun with '~'")
    assert found.bos == "~"
    without = evaluation_windows(source, tokenizer, length=10, bos="never")
    published = [95, *ids]  # tokenised once, as the tokenizer does it, and cut
    assert without.ids.tolist() == [published[n : n + 10] for n in (0, 10, 20, 30)]
    assert without.protocol.endswith("cut into consecutive windows") and without.bos is None


@pytest.mark.parametrize("take", [calibration_windows, evaluation_windows])
def test_rows_of_token_ids_get_the_token_under_always_alone(
    take: Any, tmp_path: Path, characters: Any
) -> None:
    rows = [[3, 4, 5, 6], [95, 4, 5, 6]]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    number = {"samples": 2} if take is calibration_windows else {}
    for rule in ("auto", "never"):
        plain = take(str(path), characters(adds=True), bos=rule, **number)
        assert plain.ids.tolist() == rows and plain.bos is None
    found = take(str(path), characters(), bos="always", **number)
    assert found.ids.tolist() == [[95, 3, 4, 5], [95, 4, 5, 6]] and found.bos == "~"
    with pytest.raises(UsageError, match="has no tokenizer"):
        take(str(path), None, bos="always", **number)
    with pytest.raises(UsageError, match="are taken as they are: --pack-documents is for texts"):
        take(str(path), None, pack_documents=True, **number)
