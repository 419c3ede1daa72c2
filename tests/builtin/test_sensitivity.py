"""Sensitivity search: planted damages with a known optimum, the budget, and a tiny model."""

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import neuroal
from neuroal import Generation, Layout, Measurement, Proposal
from neuroal.plugins import load_top_up
from neuroal.testing import layout, tiny_model, windows
from neuroal_plugins.block_ratios.sensitivity import Sensitivity, units_within
from neuroal_plugins.run_budget import RunBudget

SHAPES = {"q": (4, 4), "o": (4, 4), "up": (12, 4), "down": (4, 12)}
STEEPNESS = 9.0


@dataclass
class PricedRecord:
    """What a search proposed and what it was charged."""

    generations: list[Generation] = field(default_factory=list)
    full: list[tuple[float, Proposal]] = field(default_factory=list)
    block_runs: int = 0
    windows: set[int] = field(default_factory=set)

    @property
    def best(self) -> Proposal:
        return min(self.full, key=lambda pair: pair[0])[1]


def price(model: Layout, proposal: Proposal, start: int, count: int) -> int:
    """Block runs of a candidate that shares everything before block `start` with others."""
    pruned = {model.linears[n].block for n, r in proposal.ratios.items() if r > 0}
    return sum(2 if b.index in pruned else 1 for b in model.blocks[start:]) * count


def drive(
    steps: Generator[Generation, list[Measurement], Any],
    model: Layout,
    damage: Callable[[Mapping[str, Any]], float],
    total: int = 8,
    behind: int = 1,
) -> PricedRecord:
    """Answer a search as the engine does, with prefixes shared within a generation.

    Around its first proposal a block behind a change costs `behind` runs.
    """
    run, answer = PricedRecord(), None
    try:
        while True:
            generation = next(steps) if answer is None else steps.send(answer)
            count = min(generation.windows or total, total)
            run.generations.append(generation)
            run.windows.add(count)
            answer, first = [], generation.proposals[0]
            for proposal in generation.proposals:
                differs = [
                    x.block
                    for n, x in model.linears.items()
                    if proposal.ratios[n] != first.ratios[n]
                ]
                start = 0 if proposal is first else min(differs, default=0)
                runs = price(model, proposal, start, count)
                if generation.reuse_first_weights and proposal is not first:
                    runs = behind * (len(model.blocks) - start) * count
                cost = damage(proposal.ratios)
                answer.append(Measurement(cost, False, runs))
                run.block_runs += runs
                if not generation.probe and count == total:
                    run.full.append((cost, proposal))
    except StopIteration as stop:
        assert stop.value is None
    return run


def planted(model: Layout, seed: int) -> dict[str, float]:
    """Damage per weight at the uniform ratio, within a factor of e^2 of one another."""
    draws = torch.rand(len(model.linears), generator=torch.Generator().manual_seed(seed))
    return {n: math.exp(2 * x) for n, x in zip(model.linears, draws.tolist(), strict=True)}


def additive(model: Layout, at: Mapping[str, float], sparsity: float) -> Any:
    """The model of the docstring, exactly: sum of a_l n_l exp(b (r_l - S)), 0 where r is 0."""

    def damage(ratios: Mapping[str, Any]) -> float:
        return math.fsum(
            a * model.linears[n].weights * math.exp(STEEPNESS * (ratios[n] - sparsity))
            for n, a in at.items()
            if ratios[n] > 0
        )

    return damage


def optimum(model: Layout, at: Mapping[str, float], sparsity: float) -> dict[str, float]:
    """r_l = S - log(a_l) / b + const."""
    mean = math.fsum(math.log(at[n]) * x.weights for n, x in model.linears.items()) / model.weights
    return {n: sparsity - (math.log(a) - mean) / STEEPNESS for n, a in at.items()}


@pytest.mark.parametrize("seed", range(4))
def test_start_of_additive_damages_is_the_optimum(seed: int) -> None:
    model = layout(4, SHAPES)
    at = planted(model, seed)
    plugin = Sensitivity(start=1.0, steepness=STEEPNESS)
    run = drive(plugin.propose_block_ratios(model, 0.6, 8), model, additive(model, at, 0.6))
    tried = [p for _, p in run.full if p.parameters == {"at": "start", "step": 1.0}]
    wanted = optimum(model, at, 0.6)
    assert tried[0].ratios == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_rounds_approach_the_optimum_of_damages_that_multiply(seed: int) -> None:
    model = layout(4, SHAPES)
    at = planted(model, seed)
    plain = additive(model, at, 0.6)

    def damage(ratios: Mapping[str, Any]) -> float:  # the order of marginals is the same
        return plain(ratios) ** 1.5

    run = drive(Sensitivity(candidates=100).propose_block_ratios(model, 0.6, 8), model, damage)
    uniform, least = run.full[0][0], damage(optimum(model, at, 0.6))
    found = min(run.full, key=lambda pair: pair[0])[0]
    assert uniform - found > 0.9 * (uniform - least)


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.7, 0.8, 0.97])
def test_candidates_keep_the_sparsity(sparsity: float) -> None:
    model = layout(3, SHAPES)
    damage = additive(model, planted(model, 1), sparsity)
    run = drive(Sensitivity(start=5.0).propose_block_ratios(model, sparsity, 8), model, damage)
    assert len(run.full) > 2
    for _, proposal in run.full:
        values = [proposal.ratios[n] * x.weights for n, x in model.linears.items()]
        assert math.fsum(values) / model.weights == pytest.approx(sparsity, abs=1e-9)
        assert all(0 <= r <= 0.99 for r in proposal.ratios.values())


def test_probes_cannot_win_and_change_one_linear() -> None:
    model = layout(3, SHAPES)
    damage = additive(model, planted(model, 1), 0.6)
    run = drive(Sensitivity().propose_block_ratios(model, 0.6, 8), model, damage)
    alone = run.generations[1].proposals
    assert [p.parameters["only"] for p in alone] == list(model.linears)
    for generation in run.generations:
        if "more" in generation.proposals[-1].parameters:
            here, *others = generation.proposals
            assert generation.probe and generation.reuse_first_weights
            for name, p in zip(model.linears, others, strict=True):
                assert [n for n in model.linears if p.ratios[n] != here.ratios[n]] == [name]


def test_uniform_wins_where_nothing_is_better() -> None:
    model = layout(3, SHAPES)

    def damage(ratios: Mapping[str, Any]) -> float:
        return math.fsum(abs(float(r) - 0.6) for r in ratios.values())

    run = drive(Sensitivity().propose_block_ratios(model, 0.6, 8), model, damage)
    assert set(run.best.ratios.values()) == {0.6}


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_damages_are_uniform(value: float) -> None:
    model = layout(3, SHAPES)
    run = drive(Sensitivity().propose_block_ratios(model, 0.6, 8), model, lambda _: value)
    assert list(run.best.ratios.values()) == pytest.approx([0.6] * len(model.linears))


@pytest.mark.parametrize("total", [1, 3, 8])
@pytest.mark.parametrize("blocks", [1, 2, 6, 12])
@pytest.mark.parametrize("candidates", [1.5, 4, 29, 60])
@pytest.mark.parametrize("behind", [1, 2])
def test_budget_is_kept_with_the_dense_reference(
    candidates: float, blocks: int, total: int, behind: int
) -> None:
    model = layout(blocks, SHAPES)
    damage = additive(model, planted(model, 2), 0.7)
    plugin = Sensitivity(candidates=candidates)
    run = drive(plugin.propose_block_ratios(model, 0.7, total), model, damage, total, behind)
    unavoidable = 2 * blocks * total + blocks * total
    spent = run.block_runs + blocks * sum(run.windows)
    assert spent <= max(candidates * 2 * blocks * total, unavoidable)


def test_budget_in_block_runs() -> None:
    model = layout(6, SHAPES)
    damage = additive(model, planted(model, 2), 0.7)
    few = drive(Sensitivity(block_runs=700).propose_block_ratios(model, 0.7, 8), model, damage)
    many = drive(Sensitivity(block_runs=2500).propose_block_ratios(model, 0.7, 8), model, damage)
    assert few.block_runs <= 700 < many.block_runs <= 2500


def test_units_are_as_fine_as_the_budget_allows() -> None:
    model = layout(6, SHAPES)
    names = {
        budget: [u.name for u in units_within(model, RunBudget(budget, 6, 8, 96))]
        for budget in (10**4, 250, 1)
    }
    assert names[10**4] == list(model.linears)
    assert names[250][:2] == ["blocks.0.attention", "blocks.0.mlp"]
    assert names[1] == [b.name for b in model.blocks]
    assert [len(v) for v in names.values()] == [24, 12, 6]


def test_units_change_together() -> None:
    model = layout(6, SHAPES)
    damage = additive(model, planted(model, 3), 0.6)
    run = drive(Sensitivity(candidates=5).propose_block_ratios(model, 0.6, 8), model, damage)
    last = run.full[-1][1].ratios
    assert len({round(float(r), 9) for r in last.values()}) > 1
    for b in model.blocks:
        assert len({last[x.name] for x in b.linears if x.part == "mlp"}) == 1


def test_search_repeats_itself() -> None:
    model = layout(3, SHAPES)
    damage = additive(model, planted(model, 4), 0.6)
    a, b = (
        drive(Sensitivity().propose_block_ratios(model, 0.6, 8), model, damage).full
        for _ in range(2)
    )
    assert [(c, dict(p.ratios)) for c, p in a] == [(c, dict(p.ratios)) for c, p in b]


@pytest.mark.parametrize(
    ("model", "sparsity"), [(layout(1, {"q": (4, 4)}), 0.5), (layout(2, SHAPES), 0.0)]
)
def test_nothing_to_allocate(model: Layout, sparsity: float) -> None:
    with pytest.raises(StopIteration) as stop:
        next(Sensitivity().propose_block_ratios(model, sparsity, 8))
    assert isinstance(stop.value.value, Proposal)
    assert set(stop.value.value.ratios.values()) == {sparsity}


@pytest.mark.parametrize(
    "options",
    [
        {"candidates": 0},
        {"block_runs": 0},
        {"probe_windows": 0},
        {"probe": 1.0},
        {"steepness": -1.0},
        {"memory": 1.0},
        {"step": -0.1},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sensitivity(**options)


@pytest.mark.parametrize(("name", "candidates"), [("best", 29), ("best-slow", 20)])
def test_presets(name: str, candidates: float) -> None:
    preset = load_top_up(name)
    assert preset.block_ratios == ("sensitivity",)
    assert preset.alignment == "output_kl"
    options = dict(preset.options.get("sensitivity", {}))
    assert Sensitivity(**options).candidates == candidates


@pytest.mark.parametrize("alignment", ["output_kl", "neuron"])
@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_tiny_model_is_pruned_within_the_budget(pruner: str, alignment: str) -> None:
    ids = windows(8, 16)
    recipe = neuroal.Recipe(
        sparsity=0.6, pruner=pruner, top_up="best", alignment=alignment, search_samples=4
    )
    report = neuroal.prune(tiny_model("llama"), None, recipe, windows=ids)
    final = 0 if pruner == "magnitude" else (2 * 3 - 1) * 8
    assert report.counts["block_runs"] - final <= 29 * 2 * 3 * 4
    assert report.sparsity["achieved"] == pytest.approx(0.6, abs=1e-4)
    costs = [c["misalignment"] for c in report.candidates if not c["probe"] and c["windows"] == 4]
    chosen = next(c for c in report.candidates if c["selected"])
    assert chosen["misalignment"] == min(costs) <= costs[0]
