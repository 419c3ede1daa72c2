"""Ratios that are given: over depth, by pattern, by a file; what counts, and what is shifted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuroal import Importance, Recipe, UsageError
from neuroal.layout import Block, Layout, Linear
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.targets import Rules, targets
from neuroal.recipe import GivenRatio
from neuroal.run.given import given_ratios, over_depth


def linear(block: int, name: str, rows: int, columns: int) -> Linear:
    return Linear(f"h.{block}.{name}", block, rows, columns, 0, None)


# Three blocks of `a` with 8 weights and `b` with 24: 96 weights in all.
FOUND = Layout(
    tuple(Block(i, f"h.{i}", (linear(i, "a", 4, 2), linear(i, "b", 4, 6))) for i in range(3))
)
NAMES = [f"h.{i}.{n}" for i in range(3) for n in "ab"]


RULES = Rules(0.5)


def ratios(recipe: Recipe, rules: Rules = RULES, earlier: Any = None) -> list[float]:
    given = given_ratios(recipe, FOUND, rules, earlier)
    assert given is not None
    return [given.allocation.ratios[name] for name in NAMES]


def allocation(*values: float | Tensor, partial: bool = False, **importance: Any) -> Allocation:
    named: dict[str, float | Tensor] = dict(zip(NAMES, values, strict=not partial))
    return Allocation.of(named, FOUND, partial=partial, **importance)


@pytest.mark.parametrize(
    ("sparsity", "blocks", "expected"),
    [
        ((0.2, 0.6), 3, [0.2, 0.4, 0.6]),
        ((0.6, 0.0), 4, [0.6, 0.4, 0.2, 0.0]),
        ((0.1, 0.5, 0.3), 5, [0.1, 0.3, 0.5, 0.4, 0.3]),
        ((0.1, 0.9, 0.1), 4, [0.1, 0.1 + 0.8 * 2 / 3, 0.1 + 0.8 * 2 / 3, 0.1]),
        ((0.1, 0.2, 0.3, 0.4), 2, [0.1, 0.4]),
        ((0.7,), 3, [0.7, 0.7, 0.7]),
        ((0.2, 0.6), 1, [0.4]),
        (0.3, 2, [0.3, 0.3]),
        (None, 2, [0.5, 0.5]),
    ],
)
def test_over_depth(sparsity: Any, blocks: int, expected: list[float]) -> None:
    assert over_depth(sparsity, blocks) == pytest.approx(expected, abs=1e-15)


def test_a_plain_sparsity_gives_no_ratios() -> None:
    assert given_ratios(Recipe(sparsity=0.4), FOUND, Rules(0.4), None) is None


def test_a_list_has_the_mean_of_its_weights() -> None:
    recipe = Recipe(sparsity=(0.2, 0.6))
    given = given_ratios(recipe, FOUND, Rules(0.4), None)
    assert given is not None and given.notes == () and given.sparsity == pytest.approx(0.4)
    assert ratios(recipe) == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6])


def test_the_last_pattern_counts_and_keep_is_above_all() -> None:
    recipe = Recipe(
        sparsity=0.4,
        ratios=(GivenRatio("*.b", 0.6), GivenRatio("h.1", (0.1, 0.3, 0.5)), GivenRatio("h.2.b", 0)),
    )
    assert ratios(recipe) == pytest.approx([0.4, 0.6, 0.3, 0.3, 0.4, 0.0])
    kept = dict.fromkeys(("h.0.a", "h.1.b"), "--keep")
    rules = Rules(0.4, dense=kept)
    assert ratios(recipe, rules) == pytest.approx([0.0, 0.6, 0.3, 0.0, 0.4, 0.0])
    given = given_ratios(recipe, FOUND, rules, None)
    assert given is not None
    pruned = 0.6 * 24 + 0.3 * 8 + 0.4 * 8  # of the 64 weights that are not kept, by hand
    assert given.sparsity == pytest.approx(pruned / 64)
    over_all = given_ratios(recipe, FOUND, Rules(0.4, dense=kept, over="all"), None)
    assert over_all is not None and over_all.sparsity == pytest.approx(pruned / 96)


def test_patterns_are_above_an_allocation() -> None:
    recipe = Recipe(allocation="x", ratios=(GivenRatio("h.0", 0.1),))
    earlier = allocation(0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert ratios(recipe, earlier=earlier) == pytest.approx([0.1, 0.1, 0.4, 0.5, 0.6, 0.7])


def test_an_allocations_own_mean_is_its_sparsity() -> None:
    earlier = allocation(0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    given = given_ratios(Recipe(allocation="x"), FOUND, Rules(0.5), earlier)
    assert given is not None and given.notes == ()
    assert given.sparsity == pytest.approx((8 * 1.2 + 24 * 1.5) / 96)
    assert given.allocation.ratios == earlier.ratios


def test_a_shift_is_said_and_zeros_stay() -> None:
    earlier = allocation(0.0, 0.2, 0.4, 0.4, 0.0, 0.9)
    own = (24 * 0.2 + 8 * 0.4 + 24 * 0.4 + 24 * 0.9) / 96
    given = given_ratios(Recipe(allocation="x", sparsity=0.5), FOUND, Rules(0.5), earlier)
    assert given is not None and given.sparsity == pytest.approx(0.5)
    # 80 weights are moved; 0.9 stops at 0.99, so the other 56 have the rest of 8.8 weights.
    shift = (0.5 * 96 - own * 96 - 24 * 0.09) / 56
    expected = [0.0, 0.2 + shift, 0.4 + shift, 0.4 + shift, 0.0, 0.99]
    assert [given.allocation.ratios[n] for n in NAMES] == pytest.approx(expected)
    assert given.notes == (
        f"allocation 'x' has a sparsity of {own:.6g}: its ratios are shifted by {shift:+.4g} to "
        "have 0.5; a ratio of 0 stays 0",
    )
    rules = Rules(given.sparsity, given=True)
    counts = targets(given.allocation, FOUND, rules)
    assert int(counts["h.0.a"].counts.sum()) == int(counts["h.2.a"].counts.sum()) == 0
    assert sum(int(t.counts.sum()) for t in counts.values()) == 48


def test_less_than_half_a_weight_is_no_shift() -> None:
    earlier = allocation(*[0.5 + 0.4 / 96] * 6)
    given = given_ratios(Recipe(allocation="x", sparsity=0.5), FOUND, Rules(0.5), earlier)
    assert given is not None and given.notes == ()
    assert given.allocation.ratios == earlier.ratios


def test_a_shift_counts_what_is_kept_where_the_sparsity_is_over_all() -> None:
    kept = dict.fromkeys(("h.0.a", "h.0.b"), "--keep")
    rules = Rules(0.2, dense=kept, over="all")
    earlier = allocation(*[0.5] * 6)
    given = given_ratios(Recipe(allocation="x", sparsity=0.2), FOUND, rules, earlier)
    assert given is not None and given.sparsity == pytest.approx(0.2)
    assert [given.allocation.ratios[n] for n in NAMES] == pytest.approx([0, 0, 0.3, 0.3, 0.3, 0.3])


def test_too_many_zeros() -> None:
    earlier = allocation(0.0, 0.0, 0.5, 0.5, 0.0, 0.0)
    with pytest.raises(UsageError, match="more than allocation 'x' can have: 4 of 6 linears have"):
        ratios(Recipe(allocation="x", sparsity=0.5), earlier=earlier)


def test_a_file_may_name_some_linears_only() -> None:
    earlier = allocation(0.2, 0.3, partial=True)
    assert ratios(Recipe(allocation="x", sparsity=0.6), earlier=earlier) == pytest.approx(
        [0.2, 0.3, 0.6, 0.6, 0.6, 0.6]
    )
    assert ratios(Recipe(allocation="x", sparsity=(0.1, 0.5)), earlier=earlier) == pytest.approx(
        [0.2, 0.3, 0.3, 0.3, 0.5, 0.5]
    )
    match = "'x' has a ratio of 2 of 6 linears, none of 'h.1.a': give --sparsity for the others"
    with pytest.raises(UsageError, match=match):
        ratios(Recipe(allocation="x"), earlier=earlier)
    kept = dict.fromkeys(NAMES[2:], "--keep")
    assert ratios(Recipe(allocation="x"), Rules(0.5, dense=kept), earlier) == (
        pytest.approx([0.2, 0.3, 0, 0, 0, 0])
    )


def test_a_whole_allocation_and_a_list_say_the_same_twice() -> None:
    with pytest.raises(UsageError, match="both give every ratio: drop one"):
        ratios(Recipe(allocation="x", sparsity=(0.1, 0.5)), earlier=allocation(*[0.5] * 6))


def test_rows_follow_their_linear() -> None:
    rows = torch.tensor([0.0, 0.2, 0.4, 0.6], dtype=torch.float64)
    earlier = allocation(*[rows] * 6)
    recipe = Recipe(allocation="x", ratios=(GivenRatio("h.0.a", 0.0), GivenRatio("h.0.b", 0.9)))
    given = given_ratios(recipe, FOUND, Rules(0.5), earlier)
    assert given is not None
    made = given.allocation.rows
    assert made["h.1.a"].equal(rows) and not made["h.0.a"].any()
    assert made["h.0.b"].tolist() == [0.9] * 4  # three rows alone cannot have this mean
    shifted = given_ratios(Recipe(allocation="x", sparsity=0.45), FOUND, Rules(0.45), earlier)
    assert shifted is not None  # three rows of four have the shift of 4 * 0.15 / 3
    assert shifted.allocation.rows["h.2.b"].tolist() == pytest.approx([0.0, 0.4, 0.6, 0.8])


def test_importance_goes_with_what_is_pruned() -> None:
    values = {n: Importance(torch.arange(1.0, 5.0)) for n in NAMES}
    earlier = allocation(*[0.5] * 6, importance=values)
    recipe = Recipe(allocation="x", ratios=(GivenRatio("h.1", 0),))
    given = given_ratios(recipe, FOUND, Rules(0.5), earlier)
    assert given is not None
    assert given.allocation.importance.keys() == {"h.0.a", "h.0.b", "h.2.a", "h.2.b"}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"sparsity": ()}, "sparsity is an empty list"),
        ({"sparsity": (0.5, 1.0)}, r"sparsity 1 is outside \[0, 1\)"),
        ({"sparsity": (0.5, "x")}, "sparsity 'x' is not a number"),
        ({"ratios": ({"match": "a"},)}, "an entry of ratios has no sparsity"),
        ({"ratios": ({"mach": "a", "sparsity": 0.1},)}, "unknown key 'mach': did you mean 'match'"),
        ({"ratios": ({"match": 3, "sparsity": 0.1},)}, "match=3"),
        ({"ratios": ("a",)}, "ratios have an entry 'a': give match and sparsity"),
        ({"ratios": ({"match": "a", "sparsity": 1.5},)}, r"sparsity 1\.5 is outside"),
    ],
)
def test_what_is_no_ratio(given: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Recipe(**given)


def test_a_recipe_with_ratios_is_json() -> None:
    recipe = Recipe(sparsity=(0.1, 0.3), ratios=(GivenRatio("a", 0.5), GivenRatio("b", (0.1, 0.2))))
    data = recipe.to_json()
    assert data["sparsity"] == [0.1, 0.3]
    assert data["ratios"][1] == {"match": "b", "sparsity": [0.1, 0.2]}
    assert Recipe.from_json(data) == recipe
