"""Calibration text is found in evaluation text, and is not where there is none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import neuroal
from neuroal.data.windows import Windows
from neuroal.evaluation.text_overlap import calibration_of, overlap, warn_of_overlap
from neuroal.model.pretrained import load_tokenizer
from neuroal.testing import tiny_model, tiny_tokenizer


def shares_by_hand(one: list[list[int]], other: list[list[int]], length: int) -> float:
    def sequences(rows: list[list[int]]) -> list[tuple[int, ...]]:
        return [tuple(r[n : n + length]) for r in rows for n in range(len(r) - length + 1)]

    a, b = sequences(one), sequences(other)
    return max(sum(x in b for x in a) / len(a), sum(x in a for x in b) / len(b))


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_overlap_is_the_slow_formula(length: int) -> None:
    rng = random.Random(length)
    one = [[rng.randrange(4) for _ in range(9)] for _ in range(5)]
    other = [[rng.randrange(4) for _ in range(7)] for _ in range(3)]
    found = overlap(torch.tensor(one), torch.tensor(other), length)
    assert found == pytest.approx(shares_by_hand(one, other, length), rel=1e-12)


def test_it_is_the_larger_of_two_shares() -> None:
    large = torch.arange(1000).view(10, 100)
    assert overlap(large, large[3:4]) == 1.0 == overlap(large[3:4], large)
    assert overlap(large, large + 1000) == 0.0
    assert overlap(large, large[:, :20]) == 1.0  # no longer than the shorter windows
    reordered = large.flip(1)
    assert overlap(large, reordered) == 0.0


def test_a_warning_names_both_sources(caplog: pytest.LogCaptureFixture) -> None:
    one = Windows(torch.arange(1000).view(10, 100), "mine.jsonl")
    apart = Windows(torch.arange(1000, 2000).view(10, 100), "other.txt")
    assert warn_of_overlap(one, apart) == 0 and not caplog.records
    half = Windows(torch.cat([one.ids[:5], apart.ids[:5]]), "test.txt")
    assert warn_of_overlap(one, half) == 0.5
    [said] = caplog.messages
    assert "'mine.jsonl'" in said and "'test.txt'" in said and "50 %" in said


def test_windows_of_a_run_are_drawn_again(tmp_path: Path) -> None:
    text = tmp_path / "texts.jsonl"
    rng = random.Random(0)
    lines = ["".join(rng.choices("abcdefgh ", k=90)) for _ in range(6)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    recipe = neuroal.Recipe(
        sparsity=0.5, top_up="uniform", calibration=str(text), samples=5, length=16, seed=3
    )
    out = tmp_path / "out"
    model = tiny_model("llama", blocks=1)
    report = neuroal.prune(model, tiny_tokenizer(), recipe=recipe, out=out)
    tokenizer = load_tokenizer(str(out))
    found = calibration_of(str(out), tokenizer)
    assert found is not None and report.data is not None
    assert found.sha256 == report.data["sha256"] and found.ids.shape == (5, 16)
    assert calibration_of("demo", tokenizer) is None  # no run's output
    text.write_text(text.read_text().upper())
    assert calibration_of(str(out), tokenizer) is None  # no longer what it was
    text.unlink()
    assert calibration_of(str(out), tokenizer) is None
    file = out / "neuroal.json"
    report_json = json.loads(file.read_text())
    report_json["data"]["source"] = "c4"
    file.write_text(json.dumps(report_json))
    assert calibration_of(str(out), tokenizer) is None  # the hub is not asked


@pytest.mark.parametrize("how", [{"bos": "always"}, {"bos": "always", "pack_documents": True}])
def test_windows_are_drawn_again_as_they_were_cut(how: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "x.jsonl"
    rng = random.Random(0)
    lines = ["".join(rng.choices("abcdefgh ", k=90)) for _ in range(6)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "~"
    recipe = neuroal.Recipe(
        sparsity=0.5, top_up="uniform", calibration=str(text), samples=5, length=16, **how
    )
    out = tmp_path / "out"
    neuroal.prune(tiny_model("llama", blocks=1), tokenizer, recipe=recipe, out=out)
    found = calibration_of(str(out), load_tokenizer(str(out)))
    assert found is not None and found.bos == "~"
    assert found.packed == how.get("pack_documents", False)
    assert (found.ids[:, 0] == tokenizer.bos_token_id).all()
