"""The row search on damages that are known by formula, and what it spends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import neuroal
from neuroal import Block, Generation, Layout, Linear, Measurement, Proposal
from neuroal.plugins import load_top_up
from neuroal.testing import tiny_model, windows
from neuroal_plugins.row_ratios.row_sensitivity import RowSensitivity

WINDOWS, BASE = 32, 0.5
Damage = Callable[[Mapping[str, float]], float]  # of the lam of every linear


def layout(blocks: int = 3) -> Layout:
    """Blocks of up and down; up's rows are scored at down, down's have no consumer."""
    return Layout(
        tuple(
            Block(
                b,
                f"{b}",
                (
                    Linear(f"{b}.up", b, 5, 4, 0, f"{b}.down"),
                    Linear(f"{b}.down", b, 4, 5, 1, None),
                ),
            )
            for b in range(blocks)
        )
    )


def deviation(model: Layout) -> dict[str, Tensor]:
    return {n: torch.arange(x.in_features) / 10 for n, x in model.linears.items()}


def lams(proposal: Proposal) -> dict[str, float]:
    """Return what every linear's lam must have been: rows of higher deviation are denser by it."""
    rows = {n: torch.as_tensor(r) for n, r in proposal.ratios.items()}
    return {n: float(r[0] - r[-1]) / 2 for n, r in rows.items() if n.endswith("up")}


@dataclass
class Run:
    generations: list[Generation]
    full: list[tuple[float, dict[str, float]]]
    block_runs: int


def drive(plugin: RowSensitivity, model: Layout, damage: Damage, **more: Any) -> Run:
    """Answer a search as the engine does, with a damage by formula; 2 runs a block and window."""
    run = Run([], [], 0)
    base = dict.fromkeys(model.linears, BASE)
    known = more.get("deviation", deviation(model))
    steps = plugin.propose_row_ratios(model, base, known)
    generation = next(steps)
    while True:
        run.generations.append(generation)
        used = min(generation.windows or WINDOWS, WINDOWS)
        heard, earlier = [], None
        for proposal in generation.proposals:
            at = lams(proposal)
            first = 0  # blocks before the first that differs are run once for all
            if earlier is not None and proposal.probe:
                differs = [int(n[0]) for n in at if abs(at[n] - earlier[n]) > 1e-12]
                first = min(differs, default=len(model.blocks))
            earlier = earlier or at
            runs = 2 * (len(model.blocks) - first) * used
            heard.append(Measurement(damage(at), False, runs))
            run.block_runs += runs
            if used == WINDOWS and not proposal.probe:
                run.full.append((heard[-1].misalignment, at))
        try:
            generation = steps.send(heard)
        except StopIteration as stop:
            assert stop.value is None
            return run


def bowl(at: Mapping[str, float], bend: float = 3.0) -> Damage:
    """Return a damage that is least at `at`, where each linear adds its own square."""
    return lambda lam: 1 + sum(bend * (lam[n] - x) ** 2 for n, x in at.items())


def test_one_newton_step_finds_the_bottom_of_a_bowl() -> None:
    wanted = {"0.up": 0.22, "1.up": 0.1, "2.up": 0.02}
    run = drive(RowSensitivity(), layout(), bowl(wanted))
    cost, found = min(run.full, key=lambda pair: pair[0])
    assert found == pytest.approx(wanted, abs=1e-6)
    assert cost == pytest.approx(1)


def test_a_lam_may_be_negative_and_moves_by_the_cap_at_most() -> None:
    plugin = RowSensitivity(cap=0.05, candidates=500)
    run = drive(plugin, layout(), bowl({"0.up": -0.2, "1.up": 0.1, "2.up": 0.1}))
    assert min(run.full, key=lambda pair: pair[0])[1]["0.up"] == pytest.approx(-0.2, abs=1e-6)
    values = [at["0.up"] for _, at in run.full][len(plugin.lambdas) :]
    for a, b in zip(values, values[2:], strict=False):
        assert abs(b - a) <= 0.05 + 1e-9


def test_where_nothing_bends_down_the_slope_alone_decides() -> None:
    run = drive(RowSensitivity(cap=0.1), layout(), lambda lam: 2 - lam["0.up"] + lam["2.up"])
    start = min(run.full[: len(RowSensitivity().lambdas)], key=lambda pair: pair[0])[1]
    first = run.full[len(RowSensitivity().lambdas)][1]
    assert first["0.up"] - start["0.up"] == pytest.approx(0.1)
    assert first["2.up"] - start["2.up"] == pytest.approx(-0.1)


def test_rows_of_equal_ratio_are_among_the_candidates() -> None:
    run = drive(RowSensitivity(), layout(), bowl({"0.up": 0.0, "1.up": 0.0, "2.up": 0.0}))
    assert min(run.full, key=lambda pair: pair[0]) == (1.0, {"0.up": 0.0, "1.up": 0.0, "2.up": 0.0})


@pytest.mark.parametrize("candidates", [7, 12, 20, 60])
def test_the_budget_is_kept(candidates: int) -> None:
    model = layout(6)
    plugin = RowSensitivity(candidates=candidates)
    wobbly = bowl({f"{b}.up": 0.3 - b / 10 for b in range(6)})
    run = drive(plugin, model, lambda lam: wobbly(lam) + abs(lam["0.up"] - 0.3))
    assert run.block_runs <= candidates * 2 * 6 * WINDOWS
    probes = [g.windows for g in run.generations if len(g.proposals) > 8]
    assert bool(probes) == (candidates > 8)
    assert all(w is not None and 1 <= w <= plugin.probe_windows for w in probes)


def test_it_ends_where_no_row_has_a_score() -> None:
    model = layout()
    zeros = {n: torch.zeros(x.in_features) for n, x in model.linears.items()}
    run = drive(RowSensitivity(), model, lambda lam: 1.0, deviation=zeros)
    assert len(run.generations) == 2  # the price of a window, and the grid


@pytest.mark.parametrize("base", [0.05, 0.3, 0.95])
def test_rows_keep_the_linears_ratio_where_they_are_clipped(base: float) -> None:
    model = layout()
    plugin = RowSensitivity(lambdas=(0.0, 0.3), candidates=3)
    steps = plugin.propose_row_ratios(model, dict.fromkeys(model.linears, base), deviation(model))
    next(steps)
    generation = steps.send([Measurement(1.0, False, 6)])
    for proposal in generation.proposals:
        for rows in proposal.ratios.values():
            ratios = torch.as_tensor(rows)
            assert float(ratios.mean()) == pytest.approx(base, abs=1e-9)
            assert float(ratios.min()) >= 0 and float(ratios.max()) <= 0.99


@pytest.mark.parametrize(
    "options",
    [
        {"lambdas": ()},
        {"lambdas": (1.0,)},
        {"candidates": 0},
        {"probe_windows": 0},
        {"probe": 0.0},
        {"cap": 1.0},
        {"scales": (0.5, -1.0)},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lam|" + next(iter(options))):
        RowSensitivity(**options)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_the_slow_preset_spends_ten_times_the_papers_search_at_most(pruner: str) -> None:
    ids = windows(40, 16)
    recipe = neuroal.Recipe(sparsity=0.6, pruner=pruner, top_up="best-slow")
    report = neuroal.prune(tiny_model("llama"), None, recipe, windows=ids)
    final = 0 if pruner == "magnitude" else (2 * 3 - 1) * 40
    assert report.counts["block_runs"] - final <= 10 * 2 * 3 * 8 * 29
    assert report.sparsity["achieved"] == pytest.approx(0.6, abs=1e-4)
    assert load_top_up("best-slow").search_samples == 32
    full = [c for c in report.candidates if not c["probe"] and c["misalignment"] is not None]
    assert {c["windows"] for c in full} == {32}
    chosen = [c for c in report.candidates if c["selected"]]
    least = [c["misalignment"] for c in chosen if c["misalignment"] is not None]
    assert least[-1] == min(c["misalignment"] for c in full)
    rows = "uniform" if pruner == "sparsegpt" else "row_sensitivity"
    assert [c["plugin"] for c in chosen] == ["sensitivity", rows]
