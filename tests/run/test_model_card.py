"""The model card, where what a stranger named things by is shown and never obeyed."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import neuroal
from neuroal import Recipe
from neuroal.run.model_card import model_card
from neuroal.testing import tiny_model, tiny_tokenizer

EVIL = "a`b|<img src=x onerror=y>](javascript:z)"


@pytest.fixture
def report(recipe: Recipe, windows: Tensor, tmp_path: Path) -> dict[str, Any]:
    """Of a run on a model in a folder with such a name."""
    folder = tmp_path / EVIL
    tiny_model("llama").save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    quick = dataclasses.replace(recipe, top_up="uniform", options={})
    return neuroal.prune(folder, recipe=quick, windows=windows, out=tmp_path / "out").to_json()


def outside_code(card: str) -> str:
    return re.sub(r"(?<!\\)`[^`]*`", "", card)


def test_a_hostile_folder_name(report: dict[str, Any], tmp_path: Path) -> None:
    card = (tmp_path / "out" / "README.md").read_text()
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert title == (
        r"# a\`b\|&lt;img src=x onerror=y&gt;\](javascript:z), pruned to "
        f"{report['sparsity']['achieved']:.1%}"
    )
    assert "<img" not in card


def test_hostile_texts_of_a_fine_tuned_run(report: dict[str, Any]) -> None:
    """Every text of the report: the card has the same lines, and the same cells in its tables."""
    data = {"source": "plain.txt", "windows": 2, "length": 16, "sha256": "", "bos": None}
    report |= {"training": {"settings": {"steps": 2, "lora": None, "distil": True}, "data": data}}
    report |= {"data": dict(data), "notes": ["plain"], "model": {"name": "plain"}}
    evil = copy.deepcopy(report)
    evil["training"]["data"]["source"] = evil["data"]["source"] = EVIL
    evil["notes"], evil["model"]["name"] = [EVIL], EVIL
    for plugin in evil["plugins"]:
        plugin |= {"name": EVIL, "distribution": EVIL, "version": EVIL}
    plain, card = model_card(report), outside_code(model_card(evil))
    assert [line.count("|") - line.count(r"\|") for line in card.splitlines()] == [
        line.count("|") for line in plain.splitlines()
    ]
    assert "<img" not in card and not re.search(r"(?<!\\)[`\]]", card)
