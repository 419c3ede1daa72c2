"""`--within` takes the effort, samples and length that leave the least in the time."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from neuroal import Recipe, UsageError
from neuroal.cost import within
from neuroal.cost.probes import Timed
from neuroal.testing import tiny_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a model on which a block run takes a millisecond, and everything else nothing."""

    def timed(*_: Any) -> Timed:
        kinds = ("dense", "pruned", "final_dense", "final_pruned", "own", "stage", "differentiate")
        return Timed(dict.fromkeys(kinds, 1e-3), False)

    monkeypatch.setattr(within, "time_block", timed)
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_more_time_leaves_less(model: str) -> None:
    recipe = Recipe(model=model, length=32)
    found = [within.choose(recipe, seconds, given={"length"}) for seconds in (4, 8, 30, 300)]
    assert all(x.seconds <= within.SHARE * s for x, s in zip(found, (4, 8, 30, 300), strict=True))
    assert all(a.excess >= b.excess for a, b in pairwise(found))
    assert found[0].seconds < found[-1].seconds
    assert {x.recipe.length for x in found} == {32}
    assert all(x.recipe.top_up == x.effort for x in found)
    assert f"--samples {found[0].recipe.samples} --length 32" in str(found[0])


def test_what_the_next_would_need_is_said_and_is_enough(model: str) -> None:
    recipe = Recipe(model=model, length=32)
    choice = within.choose(recipe, 4, given={"length"})
    assert choice.next is not None and choice.next.excess < choice.excess
    assert f"; the next would be effort {choice.next.effort} with " in str(choice)
    needed = choice.next.seconds / within.SHARE
    assert needed > 4
    assert within.choose(recipe, needed, given={"length"}).excess == choice.next.excess
    assert within.choose(recipe, needed * (1 - 1e-6), given={"length"}).excess == choice.excess
    best = within.choose(recipe, 3000, given={"length"})
    assert best.next is None and "next" not in str(best)


def test_of_equal_ways_the_one_with_more_text_is_taken(model: str) -> None:
    choice = within.choose(Recipe(model=model, length=64), 300, "low", {"length"})
    assert choice.recipe.samples == within.SAMPLES[-1]


def test_what_is_given_stays(model: str) -> None:
    recipe = Recipe(model=model, length=32, samples=16, pruner="ria")
    choice = within.choose(recipe, 300, "low", {"length", "samples", "pruner"})
    asked = (choice.recipe.samples, choice.recipe.pruner, choice.recipe.top_up)
    assert asked == (16, "ria", "low")


def test_too_short_says_what_is_needed(model: str) -> None:
    with pytest.raises(UsageError, match=r"too short here: at least .* effort"):
        within.choose(Recipe(model=model), 1e-6)


def test_a_named_method_is_refused(model: str) -> None:
    with pytest.raises(UsageError, match="chooses the method"):
        within.choose(Recipe(model=model, top_up="owl"), 60, given={"top_up"})


def test_between_what_was_measured() -> None:
    measured = {1024: 0.9, 4096: 0.7, 16384: 0.6}
    assert within.expected(measured, 4096) == pytest.approx(0.7)
    assert within.expected(measured, 2048) == pytest.approx(0.8)  # half of the way in logarithms
    assert within.expected(measured, 100) == 0.9 and within.expected(measured, 10**6) == 0.6
