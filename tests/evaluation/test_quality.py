"""Dense and pruned perplexity side by side: the numbers by hand, and what is said of them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from neuroal import Recipe
from neuroal.evaluation import quality
from neuroal.evaluation.perplexity import Perplexity


def of(perplexity: float, **changes: Any) -> Perplexity:
    values = {"windows": 3, "length": 16, "data": "a/test.txt", "sha256": "ab", "dtype": "float32"}
    return Perplexity(perplexity, **(values | {"protocol": "p"} | changes))


def report(excess: float, **recipe: Any) -> dict[str, Any]:
    """Of a run whose perplexity of 20 e^excess stands beside a dense one of 20."""
    asked = Recipe(sparsity=recipe.pop("sparsity", 0.6), **recipe).to_json()
    entries = [quality.entry(of(20 * math.exp(excess)), of(20.0))]
    return {"recipe": asked, "evaluation": entries}


def test_an_entry_by_hand() -> None:
    found = quality.entry(of(40.0), of(10.0))
    assert found == of(40.0).to_json() | {
        "dense_perplexity": 10.0,
        "difference": 30.0,
        "excess": pytest.approx(math.log(4)),
    }
    assert quality.words(found) == "40.0000, dense 10.0000 (+30.0000, excess 1.3863)"
    alone = quality.entry(of(40.0), None)
    assert [alone[key] for key in quality.BESIDE] == [None, None, None]
    assert quality.words(alone) == "40.0000"


@pytest.mark.parametrize("perplexity", [math.inf, math.nan])
def test_what_is_not_finite_is_text_in_json(perplexity: float) -> None:
    found = quality.entry(of(perplexity), of(10.0))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [found["perplexity"], found["difference"], found["excess"]] == [str(perplexity)] * 3
    assert f"{perplexity:.4f}, dense 10.0000" in quality.words(found)


def test_the_dense_number_is_that_of_the_same_tokens_and_dtype() -> None:
    known = {"evaluation": [quality.entry(of(40.0), of(10.0))]}
    again = quality.entry(of(20.0), None)
    assert quality.with_dense(again, known)["excess"] == pytest.approx(math.log(2))
    assert again["excess"] is None
    for other in ({"sha256": "cd"}, {"windows": 6}, {"length": 8}, {"dtype": "bfloat16"}):
        new = quality.entry(of(20.0, **other), None)
        assert quality.with_dense(new, known) == new
    unknown = {"evaluation": [quality.entry(of(40.0), None)]}
    assert quality.with_dense(again, unknown) == quality.with_dense(again, {}) == again


@pytest.mark.parametrize("excess", [-0.1, 0.0, 0.99])
def test_a_usable_model_has_not_collapsed(excess: float) -> None:
    assert list(quality.collapses(report(excess))) == []


def test_a_collapse_is_said_with_what_to_try() -> None:
    (line,) = quality.collapses(report(1.5))
    assert line.startswith(
        "the model has collapsed on 'test.txt': its perplexity of 89.6 is 4.5 times the dense "
        "model's 20.0 (excess 1.50): try --effort high"
    )
    assert line.endswith("or a sparsity below 0.6")
    (line,) = quality.collapses(report(2.0, top_up="high", sparsity=0.85))
    assert "try --effort max or a sparsity below 0.85" in line
    (line,) = quality.collapses(report(2.0, top_up="max", sparsity=0.85))
    assert "--effort" not in line and line.endswith("a sparsity below 0.85")
    (line,) = quality.collapses(report(2.0, pattern="2:4", sparsity=None))
    assert line.endswith("try --effort high or a pattern that keeps more")
    (line,) = quality.collapses(report(math.inf))
    assert "its perplexity of inf is inf times" in line
    entry = quality.entry(of(math.nan), of(20.0))
    (line,) = quality.collapses(report(0.0) | {"evaluation": [entry]})
    assert "its perplexity of nan" in line


def test_a_file_is_called_by_its_name() -> None:
    assert quality.title("/data/wikitext2.test.txt") == "wikitext2.test.txt"
    assert quality.title("wikitext2") == "wikitext2"
    assert quality.title("Salesforce/wikitext:wikitext-2-raw-v1") == (
        "Salesforce/wikitext:wikitext-2-raw-v1"
    )


def test_accuracy_in_a_line() -> None:
    tasks = {"tasks": {"rte": {}, "boolq": {}}, "accuracy": 0.5125, "harness": "lm-eval 0.4"}
    found = {"zero_shot": [tasks | {"limit": 9}, tasks | {"limit": None, "accuracy": None}]}
    assert list(quality.accuracies(found)) == [
        "accuracy on rte, boolq: 0.5125 (lm-eval 0.4, limited to 9 a task)"
    ]
