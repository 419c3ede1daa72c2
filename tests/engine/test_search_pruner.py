"""Candidates may be pruned by another pruner than the final one."""

import re
from pathlib import Path

import pytest
import torch

import neuroal
from neuroal import Recipe, UsageError
from neuroal.cli.summary import run_text
from neuroal.run.model_card import model_card
from neuroal.run.setup import setup
from neuroal.testing import tiny_model, windows

SEARCH = {
    "block_ratios": ("sensitivity",),
    "row_ratios": "row_sensitivity",
    "alignment": "output_kl",
    "options": {"sensitivity": {"candidates": 6}, "row_sensitivity": {"candidates": 9}},
}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("pruner", "searching"), [("sparsegpt", "wanda"), ("wanda", "wanda_refit")]
)
def test_the_search_is_that_of_the_other_pruner(
    pruner: str, searching: str, tmp_path: Path
) -> None:
    """One run is two: ratios that were found under one pruner, used by another."""
    ids, rows = windows(6, 16), "row_sensitivity" if pruner != "wanda" else "uniform"
    fields = SEARCH | {"row_ratios": rows, "options": {"sensitivity": {"candidates": 6}}}
    if rows != "uniform":
        fields = SEARCH
        fields["options"]["row_sensitivity"]["norm"] = ()  # no inputs where weights move
    one = tiny_model("llama", blocks=2)
    report = neuroal.prune(
        one, windows=ids, sparsity=0.6, pruner=pruner, search_pruner=searching, **fields
    )
    roles = {p["role"]: p["name"] for p in report.plugins}
    assert (roles["pruner"], roles["search_pruner"]) == (pruner, searching)
    said = run_text(report, tmp_path)
    assert re.search(rf"pruner +{pruner}\n", said) and re.search(
        rf"searched under +{searching}\n", said
    )
    found = tmp_path / "found"
    neuroal.prune(
        tiny_model("llama", blocks=2),
        windows=ids,
        recipe=Recipe(0.6, searching, **fields),
        out=found,
    )
    two = tiny_model("llama", blocks=2)
    neuroal.prune(two, windows=ids, recipe=Recipe(pruner=pruner, allocation=str(found)))
    for (name, a), b in zip(weights(one).items(), weights(two).values(), strict=True):
        assert torch.equal(a, b), name


def test_rows_need_both_pruners() -> None:
    for pruner, searching in (("wanda", "sparsegpt"), ("sparsegpt", "wanda")):
        made = setup(Recipe(0.6, pruner, search_pruner=searching))
        assert made.row_ratios is not None and made.row_ratios.name == "uniform"
        assert any("sparsegpt" in note for note in made.notes)


def test_it_is_refused_where_nothing_is_searched() -> None:
    with pytest.raises(UsageError, match="drop --block-ratios, --row-ratios, --search-pruner"):
        setup(Recipe((0.4, 0.6), search_pruner="wanda"))
    assert setup(Recipe(pattern="2:4", search_pruner="magnitude")).search_pruner.name == "wanda"


def test_the_card_says_that_weights_have_new_values() -> None:
    for reconstruction, said in (
        ("none", "Nothing was re-trained."),
        ("refit", "new values by `refit`."),
    ):
        report = neuroal.prune(
            tiny_model("llama"),
            windows=windows(4, 8),
            pruner="wanda",
            top_up="uniform",
            reconstruction=reconstruction,
        )
        assert said in model_card(report.to_json())
