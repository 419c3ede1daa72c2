"""Lambdas by parabolas: vertices by hand, planted optima, a tenth of NeuroAL's block runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neuroal
from neuroal import Block, Generation, Layout, Linear, Measurement, Proposal, Recipe
from neuroal.testing import tiny_model, windows
from neuroal_plugins import density, parabola
from neuroal_plugins.block_ratios.lambda_parabola import LambdaParabola
from neuroal_plugins.row_ratios.neuroal import Neuroal, row_proposal
from neuroal_plugins.row_ratios.neuroal_parabola import NeuroalParabola
from neuroal_plugins.top_up import NEUROAL, NEUROAL_FAST


def layout(blocks: int = 4) -> Layout:
    linears = [
        Linear(f"{b}.a", b, 4, 4, 0, f"{b + 1}.a" if b + 1 < blocks else None)
        for b in range(blocks)
    ]
    return Layout(tuple(Block(x.block, f"{x.block}", (x,)) for x in linears))


def play(
    steps: Generator[Generation, list[Measurement], Any], cost: Callable[[float], float]
) -> tuple[list[Generation], Proposal]:
    """The generations of a search, measured by a cost of their lambdas, and what it returns."""
    generations = []
    try:
        generation = next(steps)
        while True:
            generations.append(generation)
            costs = [cost(float(p.parameters["lam"])) for p in generation.proposals]
            generation = steps.send([Measurement(x, False, 1) for x in costs])
    except StopIteration as stop:
        assert isinstance(stop.value, Proposal)
        return generations, stop.value


def lambdas(generation: Generation) -> list[float]:
    return [float(p.parameters["lam"]) for p in generation.proposals]


def test_a_vertex_by_hand() -> None:
    """3 (x - 0.12)^2 + 5 at 0, 0.1 and 0.2 is 5.0432, 5.0012 and 5.0192."""
    assert parabola.vertex([0, 0.1, 0.2], [5.0432, 5.0012, 5.0192]) == pytest.approx(0.12)
    assert parabola.vertex([1, 2, 3], [4, 1, 4]) == 2
    assert parabola.vertex([1, 2, 4], [9, 4, 0]) == pytest.approx(4)  # (4 - x)^2, uneven steps


@pytest.mark.parametrize("costs", [[1, 2, 3], [1.0, 1.0, 1.0], [1, 3, 2], [1, 2, math.inf]])
def test_where_there_is_no_minimum_the_least_point_stands(costs: list[float]) -> None:
    assert parabola.vertex([1, 2, 3], costs) == 1


@given(
    optimum=st.floats(0.001, 0.249), bend=st.floats(0.01, 100), rounds=st.integers(1, 4)
)  # fmt: skip
def test_the_optimum_of_a_parabola_is_found(optimum: float, bend: float, rounds: int) -> None:
    plugin = LambdaParabola(windows=tuple(range(1, rounds + 1)))
    steps = plugin.propose_block_ratios(layout(), 0.5)
    generations, best = play(steps, lambda lam: 1 + bend * (lam - optimum) ** 2)
    assert best.parameters["lam"] == pytest.approx(optimum, abs=1e-6)
    assert [g.windows for g in generations] == list(plugin.windows)
    assert all(len(g.proposals) == 3 and not g.drop_early and not g.probe for g in generations)
    assert all(0 <= lam <= 0.25 for g in generations for lam in lambdas(g))
    wanted = density.linear_schedule(4, float(best.parameters["lam"]), 0.5)
    assert [best.ratios[f"{b}.a"] for b in range(4)] == wanted


@pytest.mark.parametrize(("slope", "found"), [(1.0, 0.0), (-1.0, 0.25)])
def test_an_optimum_outside_is_not_run_after(slope: float, found: float) -> None:
    """Within a bend so small that the vertex is far away: the end that is on its side."""
    steps = LambdaParabola().propose_block_ratios(layout(), 0.5)
    _, best = play(steps, lambda lam: 1 + slope * lam + 1e-3 * lam**2)
    assert best.parameters["lam"] == found


def test_rounds_close_in() -> None:
    plugin = LambdaParabola(windows=(1, 2, 4))
    steps = plugin.propose_block_ratios(layout(), 0.5)
    first, second, third = play(steps, lambda lam: (lam - 0.13) ** 2)[0]
    assert lambdas(first) == [0.0, 0.1, 0.2]
    assert lambdas(second) == pytest.approx([0.08, 0.13, 0.18])
    assert lambdas(third) == pytest.approx([0.105, 0.13, 0.155])
    second = play(plugin.propose_block_ratios(layout(), 0.5), lambda lam: lam**2)[0][1]
    assert lambdas(second) == pytest.approx([0.0, 0.05, 0.1])  # not below the first


def test_rows_are_neuroals() -> None:
    model, base = layout(), dict.fromkeys([f"{b}.a" for b in range(4)], 0.5)
    rng = torch.Generator().manual_seed(0)
    deviation = {name: torch.randn(4, generator=rng) for name in base}
    steps = NeuroalParabola(last_block=True).propose_row_ratios(model, base, deviation)
    (generation,), best = play(steps, lambda lam: (lam - 0.07) ** 2)
    assert generation.windows == 3 and best.parameters["lam"] == pytest.approx(0.07)
    scores = Neuroal(last_block=True).row_scores(model, deviation)
    wanted = row_proposal(model, scores, float(best.parameters["lam"]), base)
    assert best.ratios.keys() == wanted.ratios.keys()
    for name, ratios in wanted.ratios.items():
        assert torch.equal(torch.as_tensor(best.ratios[name]), torch.as_tensor(ratios))
    assert NeuroalParabola().required_statistics() == Neuroal().required_statistics()


@pytest.mark.parametrize("plugin", [LambdaParabola, NeuroalParabola])
@pytest.mark.parametrize(
    "options",
    [
        {"lambdas": (0.1, 0.2)},
        {"lambdas": (0.2, 0.1, 0.3)},
        {"lambdas": (0.0, 0.1, 1.0)},
        {"windows": ()},
        {"windows": (2, 0)},
    ],
)
def test_options_out_of_range(plugin: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"three rising|outside \[0, 1\)|not positive"):
        plugin(**options)


@pytest.mark.slow
@pytest.mark.parametrize(("pruner", "sparsity"), [("wanda", 0.8), ("magnitude", 0.6)])
def test_a_tenth_of_neuroals_block_runs(pruner: str, sparsity: float) -> None:
    """On six blocks and all its search windows; the final pruning is not counted."""
    ids = windows(8, 16)

    def search(top_up: Any) -> int:
        recipe = Recipe(
            sparsity=sparsity,
            pruner=pruner,
            block_ratios=top_up.block_ratios,
            row_ratios=top_up.row_ratios,
            search_samples=top_up.search_samples,
            samples=8,
        )
        report = neuroal.prune(tiny_model("llama", blocks=6), None, recipe, windows=ids)
        final = 0 if pruner == "magnitude" else 8 * (2 * 6 - 1)
        return report.counts["block_runs"] - final

    assert search(NEUROAL_FAST) <= search(NEUROAL) / 10


@pytest.mark.parametrize(
    ("blocks", "sparsity"), [(6, 0.6), (6, 0.8), (12, 0.7), (30, 0.6), (80, 0.8)]
)
def test_a_tenth_by_the_formula(blocks: int, sparsity: float) -> None:
    """W (C (2 L - 1) + 1) block runs a generation: with a row step, and without."""

    def generation(candidates: int, windows: int) -> int:
        return windows * (candidates * (2 * blocks - 1) + 1)

    grid = 14 if sparsity < 0.8 else 13  # NeuroAL's in its block step
    few = generation(3, 2)
    assert few <= generation(grid, 8) / 10
    assert (
        few + generation(1, 4) + generation(3, 3) <= (generation(grid, 8) + generation(15, 8)) / 10
    )
