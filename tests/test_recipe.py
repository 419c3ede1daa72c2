"""A recipe refuses what it cannot hold, and says what would have been right."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neuroal
from neuroal import Recipe, UsageError
from neuroal.testing import tiny_model, windows


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sparsty": 0.5}, "a recipe has no 'sparsty': did you mean 'sparsity'?"),
        ({"topup": "owl"}, "a recipe has no 'topup': did you mean 'top_up'?"),
        ({"sparsity": "0.5"}, "sparsity '0.5' is not a number in [0, 1)"),
        ({"keep": 1}, "recipe's keep=1 is not list of str"),
        ({"samples": 2.5}, "recipe's samples=2.5 is not int"),
        ({"samples": "8"}, "recipe's samples='8' is not int"),
        ({"samples": None}, "recipe's samples=None is not int"),
        ({"seed": True}, "recipe's seed=True is not int"),
        ({"length": "long"}, "recipe's length='long' is not int or None"),
        ({"skip_indivisible": "no"}, "recipe's skip_indivisible='no' is not bool"),
        ({"keep_zeros": 1}, "recipe's keep_zeros=1 is not bool"),
        ({"pattern": 2}, "recipe's pattern=2 is not str"),
        ({"calibration": 3}, "recipe's calibration=3 is not str or None"),
        ({"top_up": None}, "recipe's top_up=None is not str"),
        ({"budget": 1}, "recipe's budget=1 is not exact or paper"),
        ({"budget": "papr"}, "budget 'papr' is not known: did you mean 'paper'?"),
        ({"comparison": "rows"}, "comparison 'rows' is not known: did you mean 'row'?"),
        ({"options": [1]}, "recipe's options=[1] are not a mapping of plugins to options"),
        ({"requires": 1}, "recipe's requires=1 is not list of str"),
        ({"requires": (1,)}, "recipe's requires=(1,) is not list of str"),
        ({"sparsity": float("nan")}, "sparsity nan is outside [0, 1)"),
        ({"sparsity": 1.5}, "sparsity 1.5 is outside [0, 1)"),
        ({"sparsity": (0.5, 62.5)}, "sparsity 62.5 is outside [0, 1): did you mean 0.625?"),
    ],
)
def test_wrong_names_and_types_are_refused_with_the_nearest(
    fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe(**fields)
    assert str(caught.value) == said
    name, value = next(iter(fields.items()))
    if hasattr(Recipe(), name):  # replacing a field is no way round
        with pytest.raises(UsageError) as caught:
            dataclasses.replace(Recipe(), **{name: value})
        assert str(caught.value) == said


def test_numbers_of_numpy_paths_and_whole_numbers_are_what_they_mean(tmp_path: Path) -> None:
    recipe = Recipe(
        sparsity=np.float32(0.5),  # type: ignore[arg-type]
        samples=np.int64(8),  # type: ignore[arg-type]
        calibration=tmp_path / "texts.jsonl",  # type: ignore[arg-type]
        search_samples=2.0,  # type: ignore[arg-type]
    )
    assert recipe == Recipe(
        0.5, samples=8, calibration=str(tmp_path / "texts.jsonl"), search_samples=2
    )
    assert type(recipe.samples) is int and type(recipe.sparsity) is float
    assert type(recipe.calibration) is str
    assert Recipe(sparsity=0) == Recipe(sparsity=0.0)
    assert Recipe(sparsity=0).digest() == Recipe(sparsity=0.0).digest()
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recorded_recipe_may_have_numbers_as_text() -> None:
    assert Recipe.from_json({"sparsity": "0.5", "samples": "8"}) == Recipe(0.5, samples=8)


def test_prune_takes_the_fields_of_a_recipe() -> None:
    ids = windows(4, 16)
    given = {"sparsity": 0.6, "top_up": "uniform", "samples": 4, "device": "cpu"}
    one, other = tiny_model("llama", blocks=2), tiny_model("llama", blocks=2)
    report = neuroal.prune(one, windows=ids, **given)
    by_recipe = neuroal.prune(other, recipe=Recipe(**given), windows=ids)  # type: ignore[arg-type]
    assert report.recipe == by_recipe.recipe and report.sparsity["wanted"] == 0.6
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    changed = neuroal.prune(
        tiny_model("llama"),
        recipe=Recipe(**given),
        windows=ids,
        sparsity=0.3,  # type: ignore[arg-type]
    )
    assert changed.recipe["sparsity"] == 0.3 and changed.recipe["samples"] == 4


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("sparsty", "prune has no 'sparsty': did you mean 'sparsity'?"),
        ("overwrit", "prune has no 'overwrit': did you mean 'overwrite'?"),
    ],
)
def test_prune_refuses_what_it_does_not_know(field: str, said: str) -> None:
    model = tiny_model("llama", blocks=1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UsageError) as caught:
        neuroal.prune(model, windows=windows(2, 8), **{field: 0.5})
    assert str(caught.value) == said
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
