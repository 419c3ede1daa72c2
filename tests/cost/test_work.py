"""The table of work: its block runs are those that a run counts, and its seconds are theirs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

import neuroal
from neuroal import Recipe
from neuroal.cost.estimate import work
from neuroal.cost.preparation import prepare
from neuroal.cost.work import Work
from neuroal.testing import tiny_model

A_SECOND_EACH = {"dense": 1, "pruned": 1, "final_dense": 1, "final_pruned": 1}
GRIDS = {
    "linear_schedule": {"lambdas": [0.05, 0.1]},
    "neuroal": {"lambdas": [0.05, 0.1]},
}
SEARCHES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "neuroal": ({"top_up": "neuroal"}, {"linear_schedule", "neuroal"}),
    "block step": ({"top_up": "neuroal-block"}, {"linear_schedule"}),
    "row step": ({"top_up": "neuroal-row"}, {"neuroal"}),
    "uniform": ({"top_up": "uniform"}, set()),
    "owl": ({"top_up": "owl"}, set()),
    "alphapruning": ({"top_up": "alphapruning"}, set()),
    "owl, row step": ({"top_up": "owl", "row_ratios": "neuroal"}, {"neuroal"}),
    "two compete": (
        {"top_up": "neuroal-block", "block_ratios": ("uniform", "linear_schedule")},
        {"linear_schedule"},
    ),
    "three compete": (
        {"block_ratios": ("uniform", "linear_schedule", "dlp")},
        {"linear_schedule", "neuroal"},
    ),
}


def phases_of(recipe: Recipe, blocks: int = 3) -> Mapping[str, Work]:
    return work(prepare(recipe, tiny_model("llama", blocks=blocks)))


METRICS = ("neuron", "relative_l2", "output_kl")
SOME = [  # every pruner with every search, and metrics in turn; the rest is for `make test-full`
    (pruner, search, metric)
    for shift, pruner in enumerate(("wanda", "magnitude", "sparsegpt"))
    for i, search in enumerate(SEARCHES)
    for metric in (METRICS[(i + shift) % 3],)
    if pruner != "sparsegpt" or search not in ("row step", "owl, row step")
]


@pytest.mark.parametrize(
    ("pruner", "search", "metric"),
    [
        *SOME,
        *(
            pytest.param(pruner, search, metric, marks=pytest.mark.matrix)
            for pruner, search, one in SOME
            for metric in METRICS
            if metric != one
        ),
    ],
)
def test_the_block_runs_of_a_run(
    pruner: str, search: str, metric: str, recipe: Recipe, windows: Tensor
) -> None:
    """Every first generation is the only one, so none of its candidates is dropped early."""
    changes, used = SEARCHES[search]
    if pruner == "sparsegpt":
        used = used - {"neuroal"}  # left out: its masks are not per row
    options = {name: values for name, values in GRIDS.items() if name in used}
    asked = dataclasses.replace(recipe, pruner=pruner, alignment=metric, options=options, **changes)
    phases = phases_of(asked)
    report = neuroal.prune(tiny_model("llama"), None, asked, windows=windows)
    assert not any(c["dropped"] for c in report.candidates)
    assert sum(w.block_runs for w in phases.values()) == report.counts["block_runs"]


def test_work_that_nothing_reads_is_in_neither_block_runs_nor_seconds(recipe: Recipe) -> None:
    """14 candidates prune 6 blocks on 8 windows, and the dense model runs for its output alone."""
    asked = dataclasses.replace(
        recipe, pruner="magnitude", top_up="neuroal-block", alignment="output_kl", options={}
    )
    phases = phases_of(dataclasses.replace(asked, samples=8, search_samples=8), blocks=6)
    search = Work(dense=6 * 8, pruned=14 * 6 * 8, prune=14 * 6, logits=15 * 8)
    assert phases == {"search": search, "prune": Work(final_prune=6)}
    assert search.block_runs == 720 == search.seconds(A_SECOND_EACH)


def test_the_dense_walk_does_not_run_a_last_block_that_nothing_reads(recipe: Recipe) -> None:
    weights, owl = (
        dataclasses.replace(recipe, top_up=t, options={}) for t in ("alphapruning", "owl")
    )
    assert phases_of(weights)["measure"] == Work(dense=6 * 2, measure=3)
    assert phases_of(owl)["measure"] == Work(dense=6 * 3, measure=3)


def test_the_block_runs_of_a_reconstruction(recipe: Recipe, windows: Tensor) -> None:
    """The dense model beside the pruned one, and one run for each of llama's four stages."""
    for name, exact in (("refit", True), ("block", False)):
        asked = dataclasses.replace(recipe, top_up="uniform", options={}, reconstruction=name)
        table = phases_of(asked)["prune"]
        report = neuroal.prune(tiny_model("llama"), None, asked, windows=windows)
        runs = report.counts["block_runs"]
        assert table.own == 6 * 3
        if exact:
            assert table.stage == 6 * 3 * 4 and table.reconstruct == 3
            assert table.block_runs == runs
        else:  # training may end early
            assert table.block_runs - table.differentiate < runs <= table.block_runs
