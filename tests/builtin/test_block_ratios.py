"""Block ratios: each formula against a slow one, each search against a planted optimum."""

import json
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import neuroal
from neuroal import Block, Generation, Layout, Linear, Measurement, Proposal, Recipe
from neuroal.testing import tiny_model, windows
from neuroal.walk.statistics import Statistics
from neuroal_plugins import density
from neuroal_plugins.block_ratios.alphapruning import Alphapruning, exponent
from neuroal_plugins.block_ratios.dlp import Dlp
from neuroal_plugins.block_ratios.evolution import Evolution
from neuroal_plugins.block_ratios.lambda_search import LambdaSearch
from neuroal_plugins.block_ratios.linear_schedule import LAMBDAS, LinearSchedule
from neuroal_plugins.block_ratios.owl import Owl
from neuroal_plugins.block_ratios.uniform import UniformBlocks

WINDOWS = 8  # all search windows
GRID = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25]


def layout(blocks: int = 6, shapes: tuple[tuple[int, int], ...] = ((4, 4), (8, 4))) -> Layout:
    return Layout(
        tuple(
            Block(
                b,
                f"{b}",
                tuple(Linear(f"{b}.{k}", b, *shape, k, None) for k, shape in enumerate(shapes)),
            )
            for b in range(blocks)
        )
    )


def mean_ratio(model: Layout, ratios: Mapping[str, Any]) -> float:
    """The sparsity that an allocation means, weighted by weights."""
    return math.fsum(ratios[n] * x.weights for n, x in model.linears.items()) / model.weights


def per_block(model: Layout, proposal: Proposal) -> list[float]:
    """One ratio per block; all linears of a block have the same."""
    for name, linear in model.linears.items():
        assert proposal.ratios[name] == proposal.ratios[f"{linear.block}.0"]
    return [float(proposal.ratios[f"{b.index}.0"]) for b in model.blocks]


def returned(steps: Generator[Generation, Any, Any]) -> Proposal:
    """What a generator returns that measures nothing."""
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert isinstance(stop.value.value, Proposal)
    return stop.value.value


@dataclass
class SearchRecord:
    """What a search proposed, and what it cost."""

    generations: list[Generation] = field(default_factory=list)
    full: list[tuple[float, Proposal]] = field(default_factory=list)
    block_runs: int = 0

    @property
    def best(self) -> Proposal:
        """The engine's winner: least on all windows, the first on ties."""
        return min(self.full, key=lambda pair: pair[0])[1]


def drive(
    steps: Generator[Generation, list[Measurement], Any],
    cost: Callable[[Proposal], float],
    windows: int = WINDOWS,
    drop: bool = False,
) -> SearchRecord:
    """Play the engine with a toy cost; with `drop`, report losers as dropped half way."""
    run = SearchRecord()
    try:
        generation = next(steps)
        while True:
            run.generations.append(generation)
            used = windows if generation.windows is None else min(generation.windows, windows)
            answers = []
            for proposal in generation.proposals:
                value = cost(proposal)
                least = min((c for c, _ in run.full), default=math.inf)
                dropped = drop and used == windows and generation.drop_early and value > least
                answers.append(Measurement(least if dropped else value, dropped, 10 * used))
                if used == windows and not dropped:
                    run.full.append((value, proposal))
            run.block_runs += sum(a.block_runs for a in answers)
            generation = steps.send(answers)
    except StopIteration as stop:
        assert stop.value is None
    return run


# --- the arithmetic -----------------------------------------------------------------------------


@given(
    scores=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=300),
    lam=st.floats(0, 0.5),
    ratio=st.floats(0, 0.99),
)
def test_spread_is_numpys_to_the_bit(scores: list[float], lam: float, ratio: float) -> None:
    np = pytest.importorskip("numpy")
    g = np.array(scores)
    if g.max() - g.min() < 1e-9:
        return
    g = (g - g.min()) * (1 / (g.max() - g.min()) * lam * 2)
    g = g - np.mean(g) + (1 - ratio)
    assert density.spread(torch.tensor(scores, dtype=torch.float64), lam, ratio).tolist() == list(
        1 - g
    )


@given(st.integers(2, 50), st.floats(0, 0.29), st.floats(0.3, 0.7))
def test_linear_schedule_is_its_line(blocks: int, lam: float, sparsity: float) -> None:
    ratios = density.linear_schedule(blocks, lam, sparsity)
    line = [sparsity - lam + 2 * lam * b / (blocks - 1) for b in range(blocks)]
    assert ratios == pytest.approx(line, abs=1e-12)
    assert ratios == sorted(ratios)


def test_linear_schedule_rounds_as_published() -> None:
    ratios = density.linear_schedule(6, 0.2, 0.7)
    assert ratios[0] == pytest.approx(0.5)
    assert int(192 * ratios[0]) == 95


def test_linear_schedule_of_one_block() -> None:
    assert density.linear_schedule(1, 0.2, 0.7) == [0.7]


def test_clipping() -> None:
    ratios = torch.tensor([-0.1, 0.0, 0.005, 0.5, 0.995, 1.0, 1.2], dtype=torch.float64)
    assert density.clip_block_ratios(ratios) == [0.01, 0.01, 0.005, 0.5, 0.995, 0.99, 0.99]
    assert density.clip_row_ratios(ratios).tolist() == [0.01, 0.01, 0.01, 0.5, 0.99, 0.99, 0.99]


@pytest.mark.parametrize("scores", [[3.0], [2.0, 2.0, 2.0], [0.0, 0.0]])
def test_equal_scores_spread_nothing(scores: list[float]) -> None:
    assert density.spread(torch.tensor(scores), 0.1, 0.7).tolist() == [0.7] * len(scores)


# --- uniform and the linear schedule ------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999])
def test_uniform(sparsity: float) -> None:
    model = layout()
    proposal = returned(UniformBlocks().propose_block_ratios(model, sparsity))
    assert proposal.ratios == dict.fromkeys(model.linears, sparsity)


def test_linear_schedule_proposes_the_papers_grid() -> None:
    model = layout()
    run = drive(LinearSchedule().propose_block_ratios(model, 0.7), lambda p: 1.0)
    (generation,) = run.generations
    assert (generation.drop_early, generation.windows) == (True, None)
    assert [p.parameters for p in generation.proposals] == [{"lam": lam} for lam in GRID]
    for proposal in generation.proposals:
        ratios = per_block(model, proposal)
        assert ratios == density.linear_schedule(6, proposal.parameters["lam"], 0.7)
        assert mean_ratio(model, proposal.ratios) == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize(
    ("plugin", "sparsity", "last"),
    [
        (LinearSchedule(), 0.79, 0.25),
        (LinearSchedule(), 0.8, 0.2),
        (LinearSchedule(), 0.9, 0.2),
        (LinearSchedule(lambdas=(0.1, 0.25)), 0.8, 0.25),
    ],
)
def test_a_quarter_only_below_eighty_percent(
    plugin: LinearSchedule, sparsity: float, last: float
) -> None:
    proposals = drive(plugin.propose_block_ratios(layout(), sparsity), lambda p: 1.0).full
    assert proposals[-1][1].parameters["lam"] == last
    for _, proposal in proposals:
        assert all(0 <= r < 1 for r in proposal.ratios.values())


@pytest.mark.parametrize("lambdas", [(), (0.1, 1.0), (-0.1,)])
def test_lambdas_out_of_range(lambdas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="lam"):
        LinearSchedule(lambdas=lambdas)


# --- OWL, DLP, AlphaPruning ---------------------------------------------------------------------


def dense_block(seed: int) -> tuple[Block, dict[str, Tensor], dict[str, Statistics]]:
    block = layout(seed + 1).blocks[seed]
    generator = torch.Generator().manual_seed(seed)
    weights, statistics = {}, {}
    for linear in block.linears:
        # Cubed, so that some scores are more than five times the mean.
        shape = (linear.out_features, linear.in_features)
        weights[linear.name] = torch.randn(shape, generator=generator) ** 3
        norm = torch.rand(linear.in_features, generator=generator)
        statistics[linear.name] = Statistics({"input_norm": norm})
    return block, weights, statistics


def wanda_scores(weights: dict[str, Tensor], statistics: dict[str, Statistics]) -> list[float]:
    scores = []
    for name, weight in weights.items():
        norms = statistics[name].input_norm.tolist()
        scores += [abs(w) * n for row in weight.tolist() for w, n in zip(row, norms, strict=True)]
    return scores


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("multiple", [1.0, 3.0, 5.0])
def test_owl_counts_outliers(seed: int, multiple: float) -> None:
    block, weights, statistics = dense_block(seed)
    scores = wanda_scores(weights, statistics)
    threshold = multiple * sum(scores) / len(scores)
    expected = 100 * sum(s > threshold for s in scores) / len(scores)
    measured = Owl(M=multiple).measure_block(block, weights, statistics)
    assert measured["outliers"].dtype == torch.float64
    assert float(measured["outliers"]) == pytest.approx(expected)


def test_owl_by_hand() -> None:
    # Densities 0.3 + (0, 0.04, 0.16) - 0.2/3: more outliers, lower ratio.
    measurements = [{"outliers": torch.tensor(d)} for d in (1.0, 2.0, 5.0)]
    model = layout(3)
    proposal = returned(Owl().propose_block_ratios(model, 0.7, measurements))
    expected = [0.7 + 0.2 / 3, 0.66 + 0.2 / 3, 0.54 + 0.2 / 3]
    assert per_block(model, proposal) == pytest.approx(expected)
    assert proposal.parameters == {"lam": 0.08, "M": 5.0}


@pytest.mark.parametrize("seed", range(3))
def test_dlp_measures_the_mean_score(seed: int) -> None:
    block, weights, statistics = dense_block(seed)
    scores = wanda_scores(weights, statistics)
    measured = float(Dlp().measure_block(block, weights, statistics)["mean"])
    assert measured == pytest.approx(sum(scores) / len(scores), rel=1e-6)


def test_dlp_by_hand() -> None:
    # q = (5/6, 4/6, 3/6): densities 0.3 + (0.15, 0, -0.15).
    measurements = [{"mean": torch.tensor(m)} for m in (1.0, 2.0, 3.0)]
    model = layout(3)
    proposal = returned(Dlp().propose_block_ratios(model, 0.7, measurements))
    assert per_block(model, proposal) == pytest.approx([0.55, 0.7, 0.85])


def exponents(*blocks: list[float]) -> list[dict[str, Tensor]]:
    return [{"exponents": torch.tensor(b, dtype=torch.float64)} for b in blocks]


def test_alphapruning_by_hand() -> None:
    # Block means 2, 3, 4 mean relative ratios 0.7, 1, 1.3; equal blocks.
    model = layout(3)
    measurements = exponents([1.0, 3.0], [3.0], [4.0, 4.0])
    proposal = returned(Alphapruning().propose_block_ratios(model, 0.5, measurements))
    assert per_block(model, proposal) == pytest.approx([0.35, 0.5, 0.65])


def test_alphapruning_weighs_blocks_by_weights() -> None:
    small = Block(0, "0", (Linear("0.0", 0, 2, 2, 0, None),))
    large = Block(1, "1", (Linear("1.0", 1, 4, 4, 0, None),))
    model = Layout((small, large))
    proposal = returned(Alphapruning().propose_block_ratios(model, 0.5, exponents([2.0], [4.0])))
    first, second = per_block(model, proposal)
    assert mean_ratio(model, proposal.ratios) == pytest.approx(0.5)
    assert second / first == pytest.approx(1.3 / 0.7)


def test_alphapruning_clips() -> None:
    model = layout(3)
    measurements = exponents([2.0], [2.0], [4.0])
    proposal = returned(Alphapruning().propose_block_ratios(model, 0.8, measurements))
    assert per_block(model, proposal)[2] == 0.99


def test_alphapruning_puts_blocks_without_an_exponent_at_the_mean() -> None:
    model = layout(3)
    some = returned(Alphapruning().propose_block_ratios(model, 0.5, exponents([2.0], [], [4.0])))
    assert per_block(model, some) == pytest.approx([0.35, 0.5, 0.65])
    none = returned(Alphapruning().propose_block_ratios(model, 0.5, exponents([], [], [])))
    assert per_block(model, none) == [0.5] * 3


PROPOSERS: list[tuple[Any, str]] = [
    (Owl(), "outliers"),
    (Dlp(), "mean"),
    (Alphapruning(), "exponents"),
]


@pytest.mark.parametrize(("plugin", "key"), PROPOSERS)
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_equal_measurements_are_uniform(plugin: Any, key: str, blocks: int, value: float) -> None:
    model = layout(blocks)
    measurements = [{key: torch.tensor([value] if key == "exponents" else value)}] * blocks
    proposal = returned(plugin.propose_block_ratios(model, 0.7, measurements))
    assert per_block(model, proposal) == [0.7] * blocks


@pytest.mark.parametrize(("plugin", "key"), PROPOSERS)
@given(values=st.lists(st.floats(0.5, 10), min_size=2, max_size=12), sparsity=st.floats(0.4, 0.6))
def test_measured_proposals_keep_the_sparsity(
    plugin: Any, key: str, values: list[float], sparsity: float
) -> None:
    model = layout(len(values))
    shape = [1] if key == "exponents" else []
    measurements = [{key: torch.tensor(v, dtype=torch.float64).reshape(shape)} for v in values]
    proposal = returned(plugin.propose_block_ratios(model, sparsity, measurements))
    if max(per_block(model, proposal)) < 0.99:
        assert mean_ratio(model, proposal.ratios) == pytest.approx(sparsity, abs=1e-9)


def power_law(alpha: float, rows: int, columns: int) -> Tensor:
    """A matrix whose squared singular values are quantiles of p(x) ~ x^-alpha, x >= 1."""
    n = min(rows, columns)
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    eigenvalues = (1 - quantiles) ** (-1 / (alpha - 1))
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64)).Q
    return (left * eigenvalues.sqrt() @ right.T).float()


@pytest.mark.parametrize("alpha", [1.8, 2.5, 3.5, 5.0])
@pytest.mark.parametrize("shape", [(300, 300), (200, 500), (500, 200)])
def test_planted_exponent(alpha: float, shape: tuple[int, int]) -> None:
    assert exponent(power_law(alpha, *shape)) == pytest.approx(alpha, rel=0.05)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_exponent_ignores_scale(scale: float) -> None:
    weight = power_law(2.5, 100, 100)
    assert exponent(weight * scale) == pytest.approx(exponent(weight), rel=1e-3)


def test_exponent_by_hand() -> None:
    # Eigenvalues 1 and 4; the tail starts at 1: alpha = 1 + 2 / ln 4.
    assert exponent(torch.diag(torch.tensor([1.0, 2.0]))) == pytest.approx(1 + 2 / math.log(4))


def slow_exponent(eigenvalues: list[float]) -> float:
    """The definition, in plain Python."""
    logs = [math.log10(x) for x in eigenvalues]
    width = (logs[-1] - logs[0]) / 100
    counts = [0] * 100
    for x in logs:
        counts[min(int((x - logs[0]) / width), 99)] += 1
    peak = 10 ** (logs[0] + width * counts.index(max(counts)))
    n = len(eigenvalues)
    best = (math.inf, math.nan)
    for i in range(n - 1):
        if 0.95 * peak <= eigenvalues[i] <= 1.5 * peak:
            tail = eigenvalues[i:]
            alpha = 1 + len(tail) / sum(math.log(x / tail[0]) for x in tail)
            distance = max(
                abs(1 - (x / tail[0]) ** (1 - alpha) - k / len(tail)) for k, x in enumerate(tail)
            )
            best = min(best, (distance, alpha))
    return best[1]


@pytest.mark.parametrize("shape", [(30, 30), (50, 20), (3, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_exponent_is_its_definition(shape: tuple[int, int], seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    eigenvalues = sorted(float(s) ** 2 for s in torch.linalg.svdvals(weight))
    assert exponent(weight) == pytest.approx(slow_exponent(eigenvalues), rel=1e-5)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 4), torch.eye(4), torch.ones(3, 5), torch.rand(1, 6), torch.rand(6, 1)],
    ids=["zeros", "identity", "rank one", "one row", "one column"],
)
def test_no_tail_no_exponent(weight: Tensor) -> None:
    assert exponent(weight) is None
    block = Block(0, "0", (Linear("a", 0, *weight.shape, 0, None),))
    assert Alphapruning().measure_block(block, {"a": weight})["exponents"].tolist() == []


def test_options_out_of_range() -> None:
    for make in (
        lambda: Owl(M=0.0),
        lambda: Owl(lam=1.0),
        lambda: Dlp(alpha=-0.1),
        lambda: Alphapruning(epsilon=1.0),
        lambda: LambdaSearch(lambdas=(0.1,)),
        lambda: LambdaSearch(lambdas=(0.2, 0.1)),
        lambda: LambdaSearch(refinements=-1),
        lambda: LambdaSearch(block_runs=0),
        lambda: Evolution(offspring=0),
        lambda: Evolution(windows=(1,), survivors=(4, 2)),
        lambda: Evolution(windows=(0, 4)),
        lambda: Evolution(step=0.0),
    ):
        with pytest.raises(ValueError, match=r"outside|positive|rising|negative|equally long"):
            make()


# --- the search for a slope ---------------------------------------------------------------------


def lam_of(proposal: Proposal) -> float:
    return float(proposal.parameters["lam"])


@pytest.mark.parametrize("optimum", [0.0, 0.02, 0.137, 0.2, 0.25])
@pytest.mark.parametrize("drop", [False, True])
def test_lambda_search_finds_the_slope(optimum: float, drop: bool) -> None:
    steps = LambdaSearch().propose_block_ratios(layout(), 0.5)
    run = drive(steps, lambda p: abs(lam_of(p) - optimum), drop=drop)
    assert lam_of(run.best) == pytest.approx(optimum, abs=0.005)
    assert sum(len(g.proposals) for g in run.generations) == len(LAMBDAS)
    model = layout()
    for generation in run.generations:
        for proposal in generation.proposals:
            ratios = density.linear_schedule(6, lam_of(proposal), 0.5)
            assert per_block(model, proposal) == ratios


@given(optimum=st.floats(0, 0.25), power=st.floats(0.5, 3))
def test_lambda_search_never_loses_to_its_grid(optimum: float, power: float) -> None:
    def cost(proposal: Proposal) -> float:
        return abs(lam_of(proposal) - optimum) ** power

    plugin = LambdaSearch()
    run = drive(plugin.propose_block_ratios(layout(), 0.5), cost)
    assert cost(run.best) <= min(abs(lam - optimum) ** power for lam in plugin.lambdas)
    assert all(0 <= lam_of(p) <= 0.25 for _, p in run.full)


@pytest.mark.parametrize(("budget", "points"), [(1, 0), (480, 0), (559, 0), (560, 1), (720, 3)])
def test_lambda_search_keeps_its_budget(budget: int, points: int) -> None:
    plugin = LambdaSearch(block_runs=budget)  # 80 block runs a candidate, 480 the grid
    run = drive(plugin.propose_block_ratios(layout(), 0.5), lambda p: abs(lam_of(p) - 0.137))
    assert len(run.generations) == 1 + points


def test_lambda_search_of_equal_costs() -> None:
    run = drive(LambdaSearch().propose_block_ratios(layout(1), 0.5), lambda p: 1.0)
    assert lam_of(run.best) == 0.0


# --- evolution ----------------------------------------------------------------------------------


def planted(model: Layout, sparsity: float, step: float) -> dict[str, float]:
    """An allocation on the grid of levels that keeps the budget: one up, one down, in turns."""
    smallest = min(linear.weights for linear in model.linears.values())
    ratios = {}
    for k, (name, linear) in enumerate(model.linears.items()):
        level = (2 if k % 4 == 0 else 1) * (1 if k % 8 < 4 else -1)
        ratios[name] = sparsity + level * step * smallest / linear.weights
    assert mean_ratio(model, ratios) == pytest.approx(sparsity)
    return ratios


def distance(optimum: Mapping[str, float]) -> Callable[[Proposal], float]:
    return lambda p: math.fsum((float(p.ratios[n]) - r) ** 2 for n, r in optimum.items())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_evolution_finds_a_planted_allocation(seed: int, drop: bool) -> None:
    model = layout(8, ((4, 4), (8, 4)))
    optimum = planted(model, 0.5, 0.05)
    plugin = Evolution(generations=100, offspring=32)
    run = drive(
        plugin.propose_block_ratios(model, 0.5, rng(seed), WINDOWS), distance(optimum), drop=drop
    )
    assert dict(run.best.ratios) == pytest.approx(optimum)


@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.5, 0.97, 0.999])
def test_evolution_keeps_the_sparsity(sparsity: float) -> None:
    model = layout(4, ((4, 4), (8, 4), (4, 12)))
    plugin = Evolution(generations=10, offspring=8)
    cost = distance({name: 0.5 * (k % 3) for k, name in enumerate(model.linears)})
    run = drive(plugin.propose_block_ratios(model, sparsity, rng(), WINDOWS), cost)
    for generation in run.generations:
        for proposal in generation.proposals:
            assert mean_ratio(model, proposal.ratios) == pytest.approx(sparsity, abs=1e-12)
            assert all(0 <= r <= max(0.99, sparsity) + 1e-12 for r in proposal.ratios.values())


def test_evolution_starts_from_the_uniform_allocation() -> None:
    model = layout()
    run = drive(
        Evolution(generations=1).propose_block_ratios(model, 0.5, rng(), WINDOWS), lambda p: 1.0
    )
    (first,) = run.generations[0].proposals
    assert first.ratios == dict.fromkeys(model.linears, 0.5)
    assert run.generations[0].windows is None


def test_evolution_selects_in_stages() -> None:
    plugin = Evolution(generations=2)
    run = drive(plugin.propose_block_ratios(layout(), 0.5, rng(), WINDOWS), lambda p: 1.0)
    shape = [(len(g.proposals), g.drop_early, g.windows) for g in run.generations]
    assert shape == [(1, True, None), *[(64, False, 1), (8, False, 4), (2, True, None)] * 2]


def test_evolution_in_one_stage() -> None:
    plugin = Evolution(generations=3, offspring=4, windows=(), survivors=())
    run = drive(plugin.propose_block_ratios(layout(), 0.5, rng(), WINDOWS), lambda p: 1.0)
    shape = [(len(g.proposals), g.drop_early, g.windows) for g in run.generations]
    assert shape == [(1, True, None), *[(4, True, None)] * 3]


def test_survivors_are_the_best() -> None:
    model = layout()
    cost = distance({name: 0.1 * (k % 5) for k, name in enumerate(model.linears)})
    plugin = Evolution(generations=1, offspring=20)
    run = drive(plugin.propose_block_ratios(model, 0.5, rng(), WINDOWS), cost)
    for before, after in zip(run.generations[1:], run.generations[2:], strict=False):
        costs = sorted(cost(p) for p in before.proposals)
        assert [cost(p) for p in after.proposals] == costs[: len(after.proposals)]


def test_offspring_are_a_few_swaps_away_and_differ() -> None:
    model = layout(6, ((4, 4),))
    plugin = Evolution(generations=1, offspring=200)
    run = drive(plugin.propose_block_ratios(model, 0.5, rng(), WINDOWS), lambda p: 1.0)
    children = [tuple(p.ratios.values()) for p in run.generations[1].proposals]
    assert len(set(children)) == len(children)
    sizes = [round(sum(abs(r - 0.5) for r in child) / 0.1) for child in children]
    assert set(sizes) == {1, 2, 3}  # swaps
    assert sizes.count(1) <= 6 * 5  # every single swap at most once


def test_swaps_are_the_lesser_of_two_draws() -> None:
    # min(r1, r2) of two dice of three: 1, 2, 3 with 5/9, 3/9, 1/9. Many linears, few collisions.
    model = layout(100, ((4, 4), (4, 4)))
    plugin = Evolution(generations=1, offspring=3000)
    run = drive(plugin.propose_block_ratios(model, 0.5, rng(), WINDOWS), lambda p: 1.0)
    children = [p.ratios.values() for p in run.generations[1].proposals]
    sizes = [round(sum(abs(r - 0.5) for r in child) / 0.1) for child in children]
    for swaps, share in ((1, 5 / 9), (2, 3 / 9), (3, 1 / 9)):
        assert sizes.count(swaps) / len(sizes) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("budget", [1, 80, 100, 500, 3000, 10000])
def test_evolution_keeps_its_budget(budget: int) -> None:
    model = layout()
    cost = distance({name: 0.1 * (k % 5) for k, name in enumerate(model.linears)})
    plugin = Evolution(block_runs=budget)
    run = drive(plugin.propose_block_ratios(model, 0.5, rng(), WINDOWS), cost)
    assert run.block_runs <= max(budget, 80)  # the uniform start is always measured
    if budget >= 3000:
        assert run.block_runs > budget * 0.7
        assert cost(run.best) < cost(run.full[0][1])


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
def test_evolution_counts_what_its_metric_refers_to(pruner: str) -> None:
    options = {"evolution": {"block_runs": 400, "windows": (1, 2)}}
    recipe = Recipe(
        sparsity=0.6, pruner=pruner, top_up="evolution", search_samples=4, options=options
    )
    report = neuroal.prune(tiny_model("llama"), None, recipe, windows=windows(8, 16))
    final = 0 if pruner == "magnitude" else (2 * 3 - 1) * 8
    assert 300 < report.counts["block_runs"] - final <= 400


def test_evolution_repeats_itself() -> None:
    model = layout()
    cost = distance({name: 0.1 * (k % 5) for k, name in enumerate(model.linears)})
    runs = [
        drive(
            Evolution(generations=5).propose_block_ratios(model, 0.5, rng(7), WINDOWS), cost
        ).best.ratios
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("model", [layout(1, ((4, 4),)), layout(1, ((4, 4), (4, 4)))])
def test_evolution_of_one_or_two_linears(model: Layout) -> None:
    plugin = Evolution(generations=3, offspring=4)
    run = drive(plugin.propose_block_ratios(model, 0.5, rng(), WINDOWS), lambda p: 1.0)
    assert run.generations
    if len(model.linears) == 1:
        assert len(run.generations) == 1


def test_evolution_ignores_a_dropped_start() -> None:
    # A start that another plugin's search dropped has only a partial sum as its cost.
    model = layout()
    steps = Evolution(generations=1, offspring=2, windows=(), survivors=()).propose_block_ratios(
        model, 0.5, rng(), WINDOWS
    )
    next(steps)
    generation = steps.send([Measurement(0.1, True, 80)])
    assert len(generation.proposals) == 2
    with pytest.raises(StopIteration):
        steps.send([Measurement(0.5, False, 80), Measurement(0.4, False, 80)])


def test_statistics() -> None:
    for plugin in (Owl(), Dlp()):
        assert plugin.required_statistics() == {"input_norm"}
    for other in (UniformBlocks(), LinearSchedule(), LambdaSearch(), Evolution(), Alphapruning()):
        assert not hasattr(other, "required_statistics")


# --- the authors' results on the shared model ---------------------------------------------------

PROJECTIONS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
PROJECTIONS += ("mlp.gate", "mlp.up", "mlp.down")


@pytest.fixture(scope="module")
def reference(shared: Path) -> list[dict[str, Any]]:
    cases = json.loads((shared / "reference" / "llama.json").read_text())["cases"]
    return [case for case in cases if "error" not in case]


@pytest.fixture(scope="module")
def llama(shared: Path) -> tuple[Layout, dict[str, Tensor]]:
    """The layout in the reference's order of linears, and the weights."""
    from safetensors.torch import load_file

    tensors = load_file(shared / "models" / "llama" / "model.safetensors")
    blocks = []
    for b in range(6):
        names = [f"model.layers.{b}.{p}_proj" for p in PROJECTIONS]
        linears = (Linear(n, b, *tensors[f"{n}.weight"].shape, 0, None) for n in names)
        blocks.append(Block(b, f"model.layers.{b}", tuple(linears)))
    model = Layout(tuple(blocks))
    return model, {name: tensors[f"{name}.weight"] for name in model.linears}


def achieved(model: Layout, proposal: Proposal) -> list[float]:
    """What int(d * ratio) pruned weights per row make of a proposal, per block."""
    return [
        sum(x.out_features * int(x.in_features * proposal.ratios[x.name]) for x in block.linears)
        / block.weights
        for block in model.blocks
    ]


def test_linear_schedule_achieves_what_was_published(
    llama: tuple[Layout, Any], reference: list[dict[str, Any]]
) -> None:
    cases = [c for c in reference if c["top_up"] == "neuroal-block" and c["pruner"] != "sparsegpt"]
    assert cases
    for case in cases:
        plugin = LinearSchedule(lambdas=(case["lam_block"],))
        run = drive(plugin.propose_block_ratios(llama[0], case["sparsity"]), lambda p: 1.0)
        assert achieved(llama[0], run.best) == pytest.approx(case["achieved_per_block"], abs=1e-6)


def test_alphapruning_has_the_published_exponents(
    llama: tuple[Layout, dict[str, Tensor]], reference: list[dict[str, Any]]
) -> None:
    model, weights = llama
    plugin = Alphapruning(published_code=True)
    measurements = [plugin.measure_block(block, weights) for block in model.blocks]
    # SparseGPT's mask follows the ratio closely; at 0.5 and 0.6 nothing is clipped.
    cases = [c for c in reference if (c["pruner"], c["top_up"]) == ("sparsegpt", "alphapruning")]
    assert {c["sparsity"] for c in cases} == {0.5, 0.6}
    for case in cases:
        steps = plugin.propose_block_ratios(model, case["sparsity"], measurements)
        ratios = returned(steps).ratios
        of_blocks = [ratios[block.linears[0].name] for block in model.blocks]
        assert of_blocks == pytest.approx(case["achieved_per_block"], abs=1e-4)


def test_owl_achieves_what_was_published(
    shared: Path, llama: tuple[Layout, dict[str, Tensor]], reference: list[dict[str, Any]]
) -> None:
    model, weights = llama
    norms = dense_norms(shared, model)
    plugin = Owl()
    measurements = [plugin.measure_block(block, weights, norms) for block in model.blocks]
    cases = [c for c in reference if c["top_up"] == "owl" and c["pruner"] != "sparsegpt"]
    assert cases
    for case in cases:
        steps = plugin.propose_block_ratios(model, case["sparsity"], measurements)
        per_case = achieved(model, returned(steps))
        assert per_case == pytest.approx(case["achieved_per_block"], abs=1e-6)


def dense_norms(shared: Path, model: Layout) -> dict[str, Statistics]:
    """Input norms of the dense model over the reference's calibration windows."""
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(shared / "models" / "llama", dtype=torch.float32)
    lines = (shared / "reference" / "llama.calibration.jsonl").read_text().splitlines()
    windows = [json.loads(line)["input_ids"] for line in lines]
    squares: dict[str, Tensor] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            squares[name] = squares.get(name, 0) + inputs[0].double().square().sum((0, 1))

        return hook

    for name in model.linears:
        dense.get_submodule(name).register_forward_pre_hook(add(name))
    with torch.no_grad():
        for window in windows:
            dense(input_ids=torch.tensor([window]), use_cache=False)
    return {
        name: Statistics({"input_norm": (total / len(windows)).sqrt().float()})
        for name, total in squares.items()
    }
