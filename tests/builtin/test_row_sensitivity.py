"""The row search on damages that are known by formula, what it spends, and its scores by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import neuroal
from neuroal import Block, Generation, Layout, Linear, Measurement, Proposal, testing
from neuroal.layout import Fed
from neuroal.plugins import load_top_up
from neuroal.pruning.allocation import Allocation
from neuroal.testing import tiny_model, windows
from neuroal_plugins.row_ratios.row_sensitivity import RowSensitivity, input_score, row_scores

WINDOWS, BASE = 32, 0.5
Logs = Mapping[str, Tensor]
Energies = list[dict[str, Tensor]]


def layout(blocks: int = 3) -> Layout:
    """Blocks of up and down; up's rows are the inputs of down, down's are read by no one."""
    found = []
    for b in range(blocks):
        fed = Fed(f"{b}.down", ((0, 0, 5),))
        up = replace(Linear(f"{b}.up", b, 5, 4, 0, f"{b}.down"), fed=fed)
        found.append(Block(b, f"{b}", (up, Linear(f"{b}.down", b, 4, 5, 1, None))))
    return Layout(tuple(found))


def weights(model: Layout, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(x.out_features, x.in_features, generator=rng)
        for n, x in model.linears.items()
    }


def norms(model: Layout, seed: int = 100) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.rand(x.in_features, generator=rng) + 0.1 for n, x in model.linears.items()}


def measured(
    model: Layout, weight: Mapping[str, Tensor] | None = None, norm: Logs | None = None
) -> Energies:
    """Return what `measure_block` says of every block."""
    weight, norm = weight or weights(model), norm or norms(model)
    statistics = {n: testing.statistics(input_norm=x) for n, x in norm.items()}
    return [RowSensitivity().measure_block(block, weight, statistics) for block in model.blocks]


def known(model: Layout) -> dict[str, dict[Any, Tensor]]:
    return row_scores(model, norms(model, 200), measured(model))


# -- the search --------------------------------------------------------------------------------


@dataclass
class Run:
    """What a search asked, and what it spent.

    Attributes:
        generations: All of them.
        full: Damage and proposal of what can win, measured on all windows.
        block_runs: Of candidates and of the dense reference of every number of windows.
    """

    generations: list[Generation] = field(default_factory=list)
    full: list[tuple[float, Proposal]] = field(default_factory=list)
    block_runs: int = 0

    @property
    def best(self) -> tuple[float, Proposal]:
        return min(self.full, key=lambda pair: pair[0])


def drive(
    plugin: RowSensitivity,
    model: Layout,
    damage: Callable[[Logs], float],
    equal: float = 2.0,
    behind: int = 1,
    **given: Any,
) -> Run:
    """Answer a search as the engine does: `equal` for the pruner's own rows, else by a formula.

    A block costs 2 runs a window; candidates of a generation share those of the first blocks that
    they prune alike. Around the first of them the others cost `behind` a block. The formula sees
    the importance of inputs, where there is any, under "inputs NAME".
    """
    run = Run()
    seen: set[int] = set()
    steps = plugin.propose_row_ratios(
        model,
        dict.fromkeys(model.linears, BASE),
        given.get("deviation", norms(model, 200)),
        given.get("measurements", measured(model)),
        given.get("weighs_inputs", False),
        WINDOWS,
    )
    generation = next(steps)
    while True:
        run.generations.append(generation)
        used = min(generation.windows or WINDOWS, WINDOWS)
        run.block_runs += 0 if used in seen else len(model.blocks) * used
        seen.add(used)
        heard, earlier = [], list[list[Any]]()
        price = 2
        for proposal in generation.proposals:
            assert proposal.ratios == dict.fromkeys(model.linears, BASE)
            pruned = of_blocks(model, proposal)
            blocks = len(model.blocks) - max((shared(pruned, x) for x in earlier), default=0)
            earlier.append(pruned)
            logs = logs_of(proposal)
            cost = damage(logs) if logs else equal
            heard.append(Measurement(cost, False, price * blocks * used))
            price = behind if generation.reuse_first_weights else 2
            run.block_runs += heard[-1].block_runs
            if used == WINDOWS and not generation.probe:
                run.full.append((heard[-1].misalignment, proposal))
        try:
            generation = steps.send(heard)
        except StopIteration as stop:
            assert stop.value is None
            return run


def logs_of(proposal: Proposal) -> dict[str, Tensor]:
    """Return the log importance of rows, and that of inputs under "inputs NAME"."""
    logs = {n: x.rows.log() for n, x in proposal.importance.items()}
    for n, x in proposal.importance.items():
        if x.inputs is not None:
            logs[f"inputs {n}"] = x.inputs.log()
    return logs


def inputs_of(proposal: Proposal) -> dict[str, Tensor]:
    """Return the importance of inputs, where there is any."""
    return {n: x.inputs for n, x in proposal.importance.items() if x.inputs is not None}


def of_blocks(model: Layout, proposal: Proposal) -> list[Any]:
    """Return what every block's rows and inputs count."""
    logs = logs_of(proposal)
    if not logs:
        return [None] * len(model.blocks)
    names = [[x.name for x in block.linears] for block in model.blocks]
    keys = [[*block, *(f"inputs {n}" for n in block)] for block in names]
    return [[logs[k].tolist() for k in block if k in logs] for block in keys]


def shared(a: list[Any], b: list[Any]) -> int:
    """Return how many first blocks are alike."""
    return next((k for k, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))


def bowl(at: Logs, bend: float = 3.0) -> Callable[[Logs], float]:
    """Return a damage that is least, 1, at a log importance."""
    return lambda logs: 1 + sum(bend * float((logs[n] - x).square().mean()) for n, x in at.items())


def bottom(model: Layout, **exponents: float) -> dict[str, Tensor]:
    """Return a log importance made of all scores, a little different in every linear."""
    return {
        n: sum(
            ((1 + k / 10) * exponents[s] * x for s, x in own.items()),
            torch.zeros(model.linears[n].out_features, dtype=torch.float64),
        )
        for k, (n, own) in enumerate(known(model).items())
    }


AT = {"reads": 0.2, "own": -0.3, "lost": 0.4}


def with_inputs(model: Layout, at: Logs, norm: float) -> dict[str, Tensor]:
    """Return a log importance of rows with one of inputs, a little different in every linear."""
    found = dict(at)
    for k, (n, x) in enumerate(model.linears.items()):
        score = input_score(x, measured(model))
        assert score is not None
        found[f"inputs {n}"] = (1 + k / 10) * norm * score
    return found


def test_a_round_goes_nearly_to_the_bottom_of_a_bowl() -> None:
    """Equal bends halve the step, and shares 0.5, 5/6, 25/18, 125/54 of it are followed to 2."""
    model = layout()
    plugin = RowSensitivity(cap=9, candidates=100, lasting=1)
    run = drive(plugin, model, bowl(bottom(model, **AT)))
    shares = [p.parameters.get("share") for _, p in run.full if p.parameters.get("round") == 1]
    assert shares == [0.5, 0.3, 0.833333, 1.388889, 2.314815, 3.858025]
    costs = {p.parameters.get("round", 0): 9.0 for _, p in run.full}
    for cost, proposal in run.full:
        at = proposal.parameters.get("round", 0)
        costs[at] = min(costs[at], cost)
    left = (1 - 125 / 54 / 2) ** 2
    grid = next(c for c, p in run.full if "reads" in p.parameters)
    assert costs[1] - 1 == pytest.approx(left * (grid - 1), rel=1e-3)
    assert run.best[0] == pytest.approx(1, abs=1e-4)


def test_a_step_is_capped_along_every_score() -> None:
    model = layout()
    far = {n: 100 * x for n, x in bottom(model, **AT).items()}
    run = drive(RowSensitivity(cap=0.05), model, bowl(far))
    start = next(p for _, p in run.full if "reads" in p.parameters)
    first = next(p for _, p in run.full if p.parameters.get("share") == 0.5)
    for name, scores in known(model).items():
        by = first.importance[name].rows.log() - start.importance[name].rows.log()
        # Orthogonal moves of length 0.5 · 0.05 along every score.
        assert float(by.square().mean()) == pytest.approx(len(scores) * 0.025**2)


def test_where_nothing_bends_the_slope_alone_decides() -> None:
    model = layout()
    slope = known(model)["1.up"]["reads"]
    run = drive(RowSensitivity(), model, lambda logs: 9 - float((logs["1.up"] * slope).mean()))
    start = next(p for _, p in run.full if "reads" in p.parameters)
    first = next(p for _, p in run.full if p.parameters.get("share") == 0.5)
    by = {n: first.importance[n].rows.log() - x.rows.log() for n, x in start.importance.items()}
    unit = slope / slope.square().mean().sqrt()
    assert torch.allclose(by["1.up"], 0.5 * 0.2 * unit)
    assert all(float(x.abs().max()) < 1e-6 for n, x in by.items() if n != "1.up")


@pytest.mark.parametrize("candidates", [2, 12, 48])
def test_the_pruners_own_rows_win_where_nothing_is_better(candidates: int) -> None:
    model = layout()
    run = drive(RowSensitivity(candidates=candidates), model, bowl(bottom(model, **AT)), equal=1.0)
    cost, proposal = run.best
    assert (cost, proposal.parameters, proposal.importance) == (1.0, {"rows": "alike"}, {})


@pytest.mark.parametrize("candidates", [2, 3, 5, 7, 9, 12, 20, 60, 300])
@pytest.mark.parametrize("blocks", [1, 6, 17])
@pytest.mark.parametrize("behind", [1, 2])
@pytest.mark.parametrize("inputs", [False, True])
def test_the_budget_is_kept(candidates: int, blocks: int, behind: int, inputs: bool) -> None:
    model = layout(blocks)
    at = bottom(model, **AT)
    smooth = bowl(with_inputs(model, at, 0.3) if inputs else at)

    def wobbly(logs: Logs) -> float:
        return smooth(logs) + math.sin(40 * float(logs["0.up"][0])) / 10

    plugin = RowSensitivity(candidates=candidates)
    run = drive(plugin, model, wobbly, behind=behind, weighs_inputs=inputs)
    assert run.block_runs <= candidates * 2 * blocks * WINDOWS
    probes = [g.windows for g in run.generations if "only" in g.proposals[-1].parameters]
    assert all(w is not None and 1 <= w <= 8 for w in probes)
    assert bool(probes) or candidates < 20


def test_inputs_are_weighed_by_their_norms_where_the_pruner_only_scores() -> None:
    """First by the best exponent that all linears share, then each by its own."""
    model = layout()
    at = with_inputs(model, bottom(model, **AT), -0.4)
    plugin = RowSensitivity(cap=9, candidates=100, lasting=1)
    run = drive(plugin, model, bowl(at), weighs_inputs=True)
    rows, inputs, best = run.generations[1:4]
    assert [set(inputs_of(p)) for p in rows.proposals] == [set(model.linears)] * 6
    assert all(bool((x == 1).all()) for p in rows.proposals for x in inputs_of(p).values())
    assert [p.parameters["norm"] for p in inputs.proposals] == [-0.5, -0.25, 0.25, 0.5]
    assert best.proposals[0].parameters["norm"] == -0.5
    for name, x in model.linears.items():
        score = log_centred(norms(model)[name].tolist())
        found = inputs_of(best.proposals[0])[name].log().tolist()
        assert found == pytest.approx([-0.5 * s for s in score], abs=1e-6)
        moved = {p.parameters["score"] for g in run.generations for p in g.proposals
                 if p.parameters.get("only") == x.name}  # fmt: skip
        assert moved == {*known(model)[name], "norm"}
    assert run.best[0] == pytest.approx(1, abs=1e-4)
    without = drive(plugin, model, bowl(bottom(model, **AT)))
    assert all(not inputs_of(p) for g in without.generations for p in g.proposals)


@pytest.mark.parametrize("candidates", [2, 3, 4, 4.5, 5, 6, 8])
def test_inputs_take_no_budget_that_the_first_exponents_of_rows_need(candidates: float) -> None:
    model = layout()
    damage = bowl(bottom(model, **AT))
    found = [
        drive(RowSensitivity(candidates=candidates), model, damage, weighs_inputs=inputs)
        for inputs in (False, True)
    ]
    costs = [run.best[0] for run in found]
    assert (costs[0] < 2.0) == (costs[1] < 2.0) == (candidates >= 5)


def test_inputs_stay_as_the_pruner_has_them_where_no_exponent_is_better() -> None:
    model = layout()
    at = with_inputs(model, bottom(model, **AT), 0.0)
    run = drive(RowSensitivity(), model, bowl(at), weighs_inputs=True)
    assert all("norm" not in p.parameters for p in run.generations[3].proposals)
    assert "reads" in run.generations[3].proposals[0].parameters


def test_later_rounds_probe_what_promised_most() -> None:
    """Gains are as the squares of the slopes: 0.9 of them come from one score of one linear."""
    model = layout()
    plugin = RowSensitivity(candidates=100, reads=(0.0,), own=(0.0,))
    far = {n: 0.02 * x for n, x in bottom(model, **AT).items()}
    far["1.up"] = 10 * far["1.up"]
    run = drive(plugin, model, bowl(far))
    rounds: dict[int, set[tuple[str, str]]] = {}
    for generation in run.generations:
        for p in generation.proposals:
            if "only" in p.parameters:
                moves = rounds.setdefault(p.parameters["round"], set())
                moves.add((p.parameters["only"], p.parameters["score"]))
    assert len(rounds) > 2 and len(rounds[1]) == 3 * 4
    assert {name for name, _ in rounds[2]} == {"1.up"}
    assert all(rounds[k] == rounds[2] for k in rounds if k > 1)


def test_probes_are_around_the_best() -> None:
    at = with_inputs(layout(), bottom(layout(), **AT), 0.3)
    run = drive(RowSensitivity(), layout(), bowl(at), weighs_inputs=True)
    for generation in run.generations:
        probes = [p for p in generation.proposals if "only" in p.parameters]
        assert generation.reuse_first_weights == bool(probes)
        first = logs_of(generation.proposals[0])
        for p in probes:
            now = logs_of(p)
            changed = {n for n, x in now.items() if not x.equal(first[n])}
            side = "inputs " if p.parameters["score"] == "norm" else ""
            assert changed == {side + p.parameters["only"]}


@pytest.mark.parametrize("exponent", [3.0, 20.0])
def test_importance_stays_within_what_is_allowed(exponent: float) -> None:
    """Log energies are up to log(1e4) apart, and moves come on top."""
    model = layout()
    energies = measured(model)
    energies[0]["rows 0.up"] = torch.tensor([1.0, 1e-8, 1.0, 1.0, 1.0], dtype=torch.float64)
    plugin = RowSensitivity(reads=(0.0,), own=(exponent,), norm=(exponent,))
    energies[0]["inputs 0.up"] = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)

    def damage(logs: Logs) -> float:
        return float(logs["0.up"][1]) + float(logs.get("inputs 0.up", logs["0.up"])[0]) + 200

    run = drive(plugin, model, damage, measurements=energies, weighs_inputs=True)
    for generation in run.generations:
        for p in generation.proposals:
            Allocation.of(p.ratios, model, p.importance)


def test_no_more_probes_are_held_together_than_64() -> None:
    model = layout(20)
    run = drive(RowSensitivity(candidates=300), model, bowl(bottom(model, **AT)))
    first = [
        len(g.proposals)
        for g in run.generations
        if g.windows == 8 and g.proposals[0].parameters.get("round") == 1
    ]
    moves = sum(len(scores) for scores in known(model).values())
    assert moves == 20 * 4 and first == [64, 64, 1 + 2 * moves - 126]  # the best in each
    assert max(len(g.proposals) for g in run.generations) == 64


def test_it_ends_where_no_row_has_a_score() -> None:
    model = layout()
    zeros = {n: torch.zeros(x.in_features) for n, x in model.linears.items()}
    alike = measured(
        model,
        {n: torch.ones(x.out_features, x.in_features) for n, x in model.linears.items()},
        {n: torch.ones(x.in_features) for n, x in model.linears.items()},
    )
    run = drive(RowSensitivity(), model, lambda _: 0.0, deviation=zeros, measurements=alike)
    assert len(run.generations) == 1  # the price of a candidate
    assert all(not p.importance for g in run.generations for p in g.proposals)


def test_a_grid_on_few_windows_cannot_win_but_its_best_can() -> None:
    model = layout()
    run = drive(RowSensitivity(reads=(0.0, 0.5), own=(0.0,)), model, bowl(bottom(model, **AT)))
    grid, best = run.generations[1:3]
    assert (grid.windows, grid.probe, len(grid.proposals)) == (8, True, 2)
    assert best.windows is None and not best.probe and len(best.proposals) == 1
    costs = [bowl(bottom(model, **AT))(logs_of(p))
             for p in grid.proposals]  # fmt: skip
    assert best.proposals[0].parameters == grid.proposals[costs.index(min(costs))].parameters
    scores = known(model)
    for name, own in scores.items():
        expected = 0.5 * own["reads"] if "reads" in own else torch.zeros(4)
        assert torch.allclose(grid.proposals[1].importance[name].rows.log(), expected.double())


@pytest.mark.parametrize(
    "options",
    [
        {"reads": ()},
        {"own": ()},
        {"candidates": 0},
        {"probe_windows": 0},
        {"probe": 0.0},
        {"share": -0.5},
        {"cap": float("nan")},
        {"lasting": 0.0},
        {"lasting": 1.5},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RowSensitivity(**options)


# -- the scores --------------------------------------------------------------------------------


def slow_energies(weight: Tensor, norm: Tensor) -> tuple[list[float], list[float]]:
    """Return sqrt of the sum of squared Wanda scores of every row, and of every column."""
    squares = [[(w * n) ** 2 for w, n in zip(row, norm.tolist(), strict=True)]
               for row in weight.tolist()]  # fmt: skip
    rows = [math.sqrt(math.fsum(row)) for row in squares]
    return rows, [math.sqrt(math.fsum(column)) for column in zip(*squares, strict=True)]


def log_centred(values: list[float]) -> list[float]:
    logs = [math.log(x) for x in values]
    return [x - math.fsum(logs) / len(logs) for x in logs]


def test_scores_of_plain_rows() -> None:
    model = layout(2)
    weight, norm, deviation = weights(model), norms(model), norms(model, 200)
    found = row_scores(model, deviation, measured(model))
    assert list(found["0.up"]) == ["reads", "own", "lost"] and list(found["0.down"]) == ["own"]
    for name, x in model.linears.items():
        own, _ = slow_energies(weight[name], norm[name])
        assert found[name]["own"].tolist() == pytest.approx(log_centred(own), abs=1e-6)
        if x.fed is not None:
            _, reads = slow_energies(weight[x.fed.linear], norm[x.fed.linear])
            assert found[name]["reads"].tolist() == pytest.approx(log_centred(reads), abs=1e-6)
            lost = deviation[x.fed.linear].double()
            at = (found[name]["lost"], lost - lost.mean())
            assert float(torch.nn.functional.cosine_similarity(*at, dim=0)) == pytest.approx(1)


@pytest.mark.parametrize("fused", [False, True])
def test_queries_and_keys_are_read_by_each_other_and_values_by_the_output(
    fused: bool, with_heads: Callable[[bool], Layout]
) -> None:
    model = with_heads(fused)
    weight, norm = weights(model), norms(model)
    if fused:
        q, k = (weight["0.qkv"][rows] for rows in (slice(0, 8), slice(8, 12)))
        seen = norm["0.qkv"]
    else:
        norm |= dict.fromkeys(("0.k", "0.v"), norm["0.q"])
        q, k, seen = weight["0.q"], weight["0.k"], norm["0.q"]
    queries, keys = slow_energies(q, seen)[0], slow_energies(k, seen)[0]
    columns = slow_energies(weight["0.o"], norm["0.o"])[1]
    reads_q = [keys[2 * (h // 2) + i] for h in range(4) for i in range(2)]
    reads_k = [math.hypot(queries[4 * g + i], queries[4 * g + 2 + i])
               for g in range(2) for i in range(2)]  # fmt: skip
    reads_v = [math.hypot(columns[4 * g + i], columns[4 * g + 2 + i])
               for g in range(2) for i in range(2)]  # fmt: skip
    found = row_scores(model, norms(model, 200), measured(model, weight, norm))
    expected = {"0.q": reads_q, "0.k": reads_k, "0.v": reads_v}
    if fused:
        expected = {"0.qkv": reads_q + reads_k + reads_v}
    for name, reads in expected.items():
        assert found[name]["reads"].tolist() == pytest.approx(log_centred(reads), abs=1e-6)
    assert "reads" not in found["0.o"]


def test_rows_that_are_read_in_part_have_no_such_score() -> None:
    model = layout(1)
    up, down = model.blocks[0].linears
    part = replace(up, fed=Fed("0.down", ((0, 0, 3),)))
    found = row_scores(Layout((Block(0, "0", (part, down)),)), norms(model, 200), measured(model))
    assert list(found["0.up"]) == ["own", "lost"]


def test_the_score_of_inputs() -> None:
    model = layout(1)
    up, down = model.blocks[0].linears
    norm = norms(model) | {"0.up": torch.tensor([2.0, 0.0, 1.0, 0.5])}
    energies = measured(model, norm=norm)
    score = input_score(up, energies)
    assert score is not None
    assert score.tolist() == pytest.approx(log_centred([2.0, 2e-4, 1.0, 0.5]))  # a dead one
    alike = measured(model, norm=norm | {"0.down": torch.full((5,), 0.3)})
    assert input_score(down, alike) is None


def test_dead_rows_count_as_the_faintest() -> None:
    model = layout(1)
    weight = weights(model)
    weight["0.up"][2] = 0
    own = row_scores(model, norms(model, 200), measured(model, weight))["0.up"]["own"]
    assert float(own.max() - own[2]) == pytest.approx(math.log(1e4))
    assert int(own.argmin()) == 2


@given(st.permutations(range(5)), st.integers(0, 9))
def test_rows_that_change_places_take_their_scores_along(order: list[int], seed: int) -> None:
    model = layout(1)
    weight, norm, deviation = weights(model, seed), norms(model, seed), norms(model, 50 + seed)
    before = row_scores(model, deviation, measured(model, weight, norm))
    weight |= {"0.up": weight["0.up"][order], "0.down": weight["0.down"][:, order]}
    norm |= {"0.down": norm["0.down"][order]}
    deviation |= {"0.down": deviation["0.down"][order]}
    after = row_scores(model, deviation, measured(model, weight, norm))
    for score, values in before["0.up"].items():
        assert torch.allclose(after["0.up"][score], values[order], atol=1e-6)
    assert torch.allclose(after["0.down"]["own"], before["0.down"]["own"], atol=1e-6)


# -- the preset --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pruner",
    ["wanda", *(pytest.param(x, marks=pytest.mark.matrix) for x in ("magnitude", "sparsegpt"))],
)
def test_the_slow_preset_spends_ten_times_the_papers_search_at_most(pruner: str) -> None:
    ids = windows(32, 16)
    recipe = neuroal.Recipe(sparsity=0.6, pruner=pruner, top_up="best-slow")
    report = neuroal.prune(tiny_model("llama"), None, recipe, windows=ids)
    final = 0 if pruner == "magnitude" else (2 * 3 - 1) * 32
    assert report.counts["block_runs"] - final <= 10 * 2 * 3 * 8 * 29
    assert report.sparsity["achieved"] == pytest.approx(0.6, abs=1e-4)
    assert load_top_up("best-slow").search_samples == 32
    full = [c for c in report.candidates if not c["probe"] and c["misalignment"] is not None]
    assert {c["windows"] for c in full} == {32}
    chosen = [c for c in report.candidates if c["selected"]]
    least = [c["misalignment"] for c in chosen if c["misalignment"] is not None]
    assert least[-1] == min(c["misalignment"] for c in full)
    assert [c["plugin"] for c in chosen] == ["sensitivity", "row_sensitivity"]
