"""Efforts are presets that name a pruner, and stand in where no method is named."""

import pytest
import torch

import neuroal
from neuroal import Recipe, UsageError
from neuroal.plugins import load_top_up
from neuroal.run.effort import DEFAULT, METHOD, efforts, with_effort
from neuroal.run.setup import setup
from neuroal.testing import tiny_model, windows


def test_the_four_are_ordered_by_what_they_leave() -> None:
    own = efforts()
    assert list(own) == ["low", "medium", "high", "max"]
    for name, preset in own.items():
        assert preset == load_top_up(name)
        assert preset.pruner and preset.reconstruction
    least = [min(x.excess.values()) for x in own.values() if x.excess]
    assert least == sorted(least, reverse=True)


def test_one_that_says_nothing_but_sparsity_gets_the_default() -> None:
    recipe = with_effort(Recipe(sparsity=0.6), None, {"sparsity"})
    assert (recipe.top_up, recipe.pruner) == (DEFAULT, load_top_up(DEFAULT).pruner)
    assert recipe.sparsity == 0.6


@pytest.mark.parametrize("field", sorted(METHOD))
def test_whoever_names_a_part_of_a_method_keeps_the_rest_as_published(field: str) -> None:
    recipe = Recipe(sparsity=0.6)
    assert with_effort(recipe, None, {"sparsity", field}) is recipe


def test_the_papers_budget_and_given_ratios_name_a_method() -> None:
    for recipe in (Recipe(budget="paper"), Recipe((0.4, 0.6))):
        assert with_effort(recipe, None, {"budget", "sparsity"}) is recipe


def test_a_named_pruner_takes_the_efforts_place() -> None:
    recipe = with_effort(Recipe(pruner="ria"), "high", {"pruner"})
    assert (recipe.pruner, recipe.top_up) == ("ria", "high")


@pytest.mark.parametrize(
    ("recipe", "effort", "given", "said"),
    [
        (Recipe(top_up="owl"), "low", {"top_up"}, "top-up 'owl': drop one"),
        (Recipe((0.4, 0.6)), "low", {"sparsity"}, "given ratios: drop one"),
        (Recipe(), "lwo", set(), "unknown effort 'lwo': did you mean 'low'?"),
        (Recipe(), "owl", set(), "efforts are low, medium, high, max"),
    ],
)
def test_what_cannot_be(recipe: Recipe, effort: str, given: set[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_effort(recipe, effort, given)
    assert said in str(caught.value)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("effort", ["low", "medium", "high", "max"])
def test_every_one_goes_with_every_pattern(effort: str, pattern: str) -> None:
    recipe = with_effort(Recipe(pattern=pattern), effort, ())
    assert setup(recipe).reconstruction is not None


def test_in_python() -> None:
    model, ids = tiny_model("llama", blocks=2), windows(4, 16)
    report = neuroal.prune(model, windows=ids, sparsity=0.5, effort="low")
    assert (report.recipe["top_up"], report.recipe["pruner"]) == ("low", "wanda")
    assert [p["name"] for p in report.plugins if p["role"] == "reconstruction"] == ["refit"]
    unnamed = neuroal.prune(tiny_model("llama", blocks=2), windows=ids, sparsity=0.5)
    assert unnamed.recipe["top_up"] == DEFAULT
    named = neuroal.prune(tiny_model("llama", blocks=2), windows=ids, recipe=Recipe(top_up="owl"))
    assert named.recipe["top_up"] == "owl"
    assert torch.equal(ids, windows(4, 16))
