"""Every pruner with every block-ratio plugin, every row-ratio plugin, and with and without refiner.

Each combination runs and keeps the budget to the weight, or is refused for the documented reason.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch

import neuroal
from neuroal import Recipe, UsageError
from neuroal.plugins import available
from neuroal.testing import tiny_model, windows

SPARSITY = 0.6
SMALL: dict[str, dict[str, Any]] = {
    "linear_schedule": {"lambdas": (0.05, 0.1)},
    "lambda_search": {"lambdas": (0.0, 0.1, 0.2), "refinements": 1},
    "evolution": {"generations": 1, "offspring": 2, "windows": (1,), "survivors": (1,)},
    "sensitivity": {"candidates": 5},
    "neuroal": {"lambdas": (0.0, 0.1)},
    "row_sensitivity": {"candidates": 4, "own": (0.0,), "probe_windows": 1},
    "alps": {"iterations": 10},
}


def names(role: str) -> list[str]:
    return [x.name for x in available(role) if x.distribution == "neuroal"]


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    return tiny_model("llama")


@pytest.mark.parametrize("pruner", names("pruner"))
@pytest.mark.parametrize("block_ratios", names("block_ratios"))
def test_a_combination_keeps_the_budget_or_is_refused(
    dense: torch.nn.Module, pruner: str, block_ratios: str
) -> None:
    ids = windows(3, 16, seed=1)
    for rows, refiner in product(names("row_ratios"), ("none", "dsnot")):
        used = {pruner, block_ratios, rows}
        recipe = Recipe(
            sparsity=SPARSITY,
            pruner=pruner,
            block_ratios=(block_ratios,),
            row_ratios=rows,
            refiner=refiner,
            search_samples=2,
            options={k: v for k, v in SMALL.items() if k in used},
        )
        model = copy.deepcopy(dense)
        by_matrix = pruner in ("sparsegpt", "admm", "alps", "ria")
        if rows in ("neuroal", "neuroal_parabola") and by_matrix:
            with pytest.raises(UsageError, match="row ratios make no sense here"):
                neuroal.prune(model, None, recipe, windows=ids)
            continue
        report = neuroal.prune(model, None, recipe, windows=ids)
        weights = report.counts["weights"]
        assert report.counts["pruned"] == int(SPARSITY * weights + 0.5), (rows, refiner)
        assert all(not m._forward_pre_hooks for m in model.modules())
        kept = dict(dense.named_parameters())
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight") not in report.linears:
                assert torch.equal(parameter, kept[name]), name


def test_different_methods_give_different_masks(dense: torch.nn.Module) -> None:
    ids = windows(3, 16, seed=1)
    masks = {}
    for pruner in names("pruner"):
        model = copy.deepcopy(dense)
        recipe = Recipe(sparsity=SPARSITY, pruner=pruner, top_up="uniform", comparison="matrix")
        report = neuroal.prune(model, None, recipe, windows=ids)
        masks[pruner] = torch.cat(
            [(model.get_submodule(n).weight == 0).flatten() for n in report.linears]
        )
    for a, b in product(masks, masks):
        assert a == b or not torch.equal(masks[a], masks[b]), (a, b)


@pytest.mark.parametrize("pruner", names("pruner"))
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns_hold_in_every_group(dense: torch.nn.Module, pruner: str, pattern: str) -> None:
    kept, of = (int(n) for n in pattern.split(":"))
    for refiner in ("none", "dsnot"):
        model = copy.deepcopy(dense)
        recipe = Recipe(pruner=pruner, top_up="uniform", pattern=pattern, refiner=refiner)
        report = neuroal.prune(model, None, recipe, windows=windows(3, 16, seed=1))
        assert report.sparsity["achieved"] == pytest.approx(1 - kept / of)
        for name in report.linears:
            weight = model.get_submodule(name).weight
            zeros = (weight.detach().reshape(-1, of) == 0).sum(dim=1)
            assert bool((zeros == of - kept).all()), (name, refiner)
