"""Short documents: what is said of them, and how they are joined."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from neuroal.data.calibration import calibration_windows
from neuroal.errors import NeuroalError
from neuroal.evaluation.perplexity import evaluation_windows

END = 1  # </s>


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def ids_of(text: str, tokenizer: Any) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(character) for character in text]


def joined_by_hand(texts: list[str], seed: int, tokenizer: Any) -> list[int]:
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    return [token for index in order for token in (*ids_of(texts[index], tokenizer), END)]


def words(count: int) -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choices("abcdefgh", k=rng.randrange(4, 12))) for _ in range(count)]


def test_a_note_counts_the_documents_that_are_too_short(tmp_path: Path, characters: Any) -> None:
    path = write(tmp_path / "x.jsonl", [*words(50), "a long document " * 9])
    found = calibration_windows(path, characters(), samples=40, length=32)
    assert found.notes == (
        "50 of 51 documents are too short for a window of 32 tokens; windows come from 1 document: "
        "--pack-documents joins short ones",
    )
    assert found.documents == 1 and not found.packed


def test_a_note_says_how_many_were_looked_at(tmp_path: Path, characters: Any) -> None:
    path = write(tmp_path / "x.jsonl", [*words(500), *["a long document " * 9] * 500])
    found = calibration_windows(path, characters(), samples=4, length=32)
    rng, seen = random.Random(0), []
    while sum(index >= 500 for index in seen) < 4:
        seen.append(rng.randrange(1000))
        if seen[-1] >= 500:
            rng.randint(0, 144 - 32 - 1)
    short = len({index for index in seen if index < 500})
    assert short and found.notes == (
        f"{short} of {short + 4} documents that were drawn (of 1,000) are too short for a window "
        "of 32 tokens; windows come from 4 documents: --pack-documents joins short ones",
    )


def test_no_note_where_no_document_is_short(tmp_path: Path, characters: Any) -> None:
    path = write(tmp_path / "x.jsonl", ["a long document " * 9] * 3)
    assert calibration_windows(path, characters(), samples=8, length=32).notes == ()


def test_packed_windows_follow_one_another(tmp_path: Path, characters: Any) -> None:
    texts, tokenizer = words(60), characters()
    path = write(tmp_path / "x.jsonl", texts)
    for seed in (0, 5):
        found = calibration_windows(
            path, tokenizer, samples=7, length=16, seed=seed, pack_documents=True
        )
        tokens = joined_by_hand(texts, seed, tokenizer)
        assert found.ids.tolist() == [tokens[n : n + 16] for n in range(0, 7 * 16, 16)]
        ends = [n for n, token in enumerate(tokens, 1) if token == END]
        used = 1 + sum(end < 7 * 16 for end in ends)
        assert found.packed and found.documents == used
        assert found.notes == (f"windows come from {used} of 60 documents, joined by '</s>'",)


def test_packed_windows_overlap_evenly_where_tokens_are_few(
    tmp_path: Path, characters: Any
) -> None:
    texts, tokenizer = words(6), characters()
    path = write(tmp_path / "x.jsonl", texts)
    tokens = joined_by_hand(texts, 0, tokenizer)
    assert 16 < len(tokens) < 9 * 16
    found = calibration_windows(path, tokenizer, samples=9, length=16, pack_documents=True)
    starts = [n * (len(tokens) - 16) // 8 for n in range(9)]
    assert found.ids.tolist() == [tokens[n : n + 16] for n in starts]
    assert starts[0] == 0 and starts[-1] + 16 == len(tokens)  # no token is left out
    assert f"windows overlap: 9 of 16 tokens are cut from {len(tokens)} tokens" in found.notes
    assert found.documents == 6
    one = calibration_windows(path, tokenizer, samples=1, length=16, pack_documents=True)
    assert one.ids.tolist() == [tokens[:16]]


def test_packed_windows_begin_with_the_token_too(tmp_path: Path, characters: Any) -> None:
    texts, tokenizer = words(60), characters(adds=True)
    path = write(tmp_path / "x.jsonl", texts)
    order = random.Random(0).sample(range(60), 60)
    tokens = [t for n in order for t in (95, *ids_of(texts[n], tokenizer), END)]
    windows = [tokens[n : n + 16] for n in range(0, 64, 16)]
    found = calibration_windows(path, tokenizer, samples=4, length=16, pack_documents=True)
    assert found.ids.tolist() == [w if w[0] == 95 else [95, *w[:15]] for w in windows]


def test_too_few_tokens_in_all_is_an_error(tmp_path: Path, characters: Any) -> None:
    path = write(tmp_path / "x.jsonl", ["abc", "defg"])  # 4 and 5 tokens with their ends
    assert calibration_windows(
        path, characters(), samples=1, length=9, pack_documents=True
    ).ids.shape == (1, 9)
    says = "all 2 documents of '.*' have 9 tokens, fewer than one window of 10: give more text, or"
    with pytest.raises(NeuroalError, match=says):
        calibration_windows(path, characters(), samples=1, length=10, pack_documents=True)
    with pytest.raises(NeuroalError, match="than 10 tokens, the longest has 4: give more text, or"):
        calibration_windows(path, characters(), samples=1, length=10)


def test_packing_is_proposed_where_it_would_do(tmp_path: Path, characters: Any) -> None:
    path = write(tmp_path / "x.jsonl", ["abc", "defg"])
    with pytest.raises(NeuroalError, match="or --pack-documents, which joins them"):
        calibration_windows(path, characters(), samples=1, length=7)
    with pytest.raises(NeuroalError) as raised:
        calibration_windows(path, characters(), samples=1, length=32)
    assert "--pack-documents" not in str(raised.value)


def test_packing_needs_an_end(tmp_path: Path, characters: Any) -> None:
    tokenizer = characters()
    tokenizer.eos_token = None
    path = write(tmp_path / "x.jsonl", words(9))
    for take, options in ((calibration_windows, {"samples": 1}), (evaluation_windows, {})):
        with pytest.raises(NeuroalError, match=r"no end-of-sequence token.*--no-pack-documents"):
            take(path, tokenizer, length=8, pack_documents=True, **options)


def test_evaluation_joins_documents_by_the_end_on_request(tmp_path: Path, characters: Any) -> None:
    texts, tokenizer = words(9), characters()
    path = write(tmp_path / "x.jsonl", texts)
    tokens = [token for text in texts for token in (*ids_of(text, tokenizer), END)]
    found = evaluation_windows(path, tokenizer, length=8, windows=3, pack_documents=True)
    assert found.ids.tolist() == [tokens[n : n + 8] for n in (0, 8, 16)]
    used = 1 + sum(token == END for token in tokens[:23])
    assert found.protocol == (
        f"{path}: {used} documents, tokenised one by one and joined by '</s>', "
        "cut into consecutive windows"
    )
    plain = evaluation_windows(path, tokenizer, length=8)
    assert "9 documents joined by '\\n\\n', tokenised once" in plain.protocol


def test_conversations_are_packed_unless_told_otherwise(tmp_path: Path, characters: Any) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = characters(template=template)
    path = tmp_path / "x.jsonl"
    rows = [{"messages": [{"role": "user", "content": text}]} for text in words(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert calibration_windows(str(path), tokenizer, samples=2, length=16).packed
    alone = calibration_windows(str(path), tokenizer, samples=2, length=8, pack_documents=False)
    assert not alone.packed
    decoded = ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in alone.ids.tolist()]
    assert all(any(window in text for text in words(20)) for window in decoded)
    joined = evaluation_windows(str(path), tokenizer, length=8, pack_documents=False)
    assert "20 conversations rendered by the model's chat template joined by" in joined.protocol
