"""Every pruner with every block-ratio plugin, every row-ratio plugin, and with and without refiner.

Each combination runs and keeps the budget to the weight, or is refused for the documented reason.
`make test` takes every pruner with every row-ratio plugin, and every other plugin in some of these;
`make test-full` takes all combinations.
"""

from __future__ import annotations

import copy
from itertools import cycle, product
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


def keeps_the_budget_or_is_refused(
    dense: torch.nn.Module, pruner: str, block_ratios: str, rows: str, refiner: str
) -> None:
    ids = windows(3, 16, seed=1)
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
    if refused(pruner, rows):
        with pytest.raises(UsageError, match="row ratios make no sense here"):
            neuroal.prune(model, None, recipe, windows=ids)
        return
    report = neuroal.prune(model, None, recipe, windows=ids)
    weights = report.counts["weights"]
    assert report.counts["pruned"] == int(SPARSITY * weights + 0.5), (rows, refiner)
    assert all(not m._forward_pre_hooks for m in model.modules())
    kept = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in report.linears:
            assert torch.equal(parameter, kept[name]), name


def refused(pruner: str, rows: str) -> bool:
    """Whether a pruner that compares a whole matrix is given ratios of its rows."""
    by_matrix = pruner in ("sparsegpt", "admm", "alps", "ria")
    return by_matrix and rows in ("neuroal", "neuroal_parabola")


REFINERS = ("none", "dsnot")
# Every pruner with every row-ratio plugin; block-ratio plugins and refiners in turn.
SOME = [
    (pruner, block_ratios, rows, refiner)
    for (i, (pruner, rows)), block_ratios in zip(
        enumerate(product(names("pruner"), names("row_ratios"))), cycle(names("block_ratios"))
    )
    for refiner in (REFINERS[(i + i // len(names("row_ratios"))) % 2],)
]


@pytest.mark.parametrize(("pruner", "block_ratios", "rows", "refiner"), SOME)
def test_some_combinations(
    dense: torch.nn.Module, pruner: str, block_ratios: str, rows: str, refiner: str
) -> None:
    keeps_the_budget_or_is_refused(dense, pruner, block_ratios, rows, refiner)


def test_some_combinations_have_every_plugin() -> None:
    """Each runs in one of them at least, and is not only refused."""
    run = [case for case in SOME if not refused(case[0], case[2])]
    assert {case[1] for case in run} == set(names("block_ratios"))
    assert {case[2] for case in run} == set(names("row_ratios"))
    assert {(case[0], case[3]) for case in run} == set(product(names("pruner"), REFINERS))


@pytest.mark.matrix
@pytest.mark.parametrize("pruner", names("pruner"))
@pytest.mark.parametrize("block_ratios", names("block_ratios"))
def test_every_combination(dense: torch.nn.Module, pruner: str, block_ratios: str) -> None:
    for rows, refiner in product(names("row_ratios"), REFINERS):
        keeps_the_budget_or_is_refused(dense, pruner, block_ratios, rows, refiner)


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
