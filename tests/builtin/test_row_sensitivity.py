"""Exponents on damages that are known by formula, and the scores by hand."""

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


def known(model: Layout) -> dict[str, dict[str, Tensor]]:
    return row_scores(model, measured(model))


# -- the search --------------------------------------------------------------------------------


@dataclass
class RowRecord:
    """What a search asked: its generations, and damage and proposal of what can win."""

    generations: list[Generation] = field(default_factory=list)
    full: list[tuple[float, Proposal]] = field(default_factory=list)

    @property
    def best(self) -> tuple[float, Proposal]:
        return min(self.full, key=lambda pair: pair[0])


def drive(
    plugin: RowSensitivity,
    model: Layout,
    damage: Callable[[Logs], float],
    equal: float = 2.0,
    total: int = WINDOWS,
    measurements: Energies | None = None,
    weighs_inputs: bool = False,
) -> RowRecord:
    """Answer a search as the engine does: `equal` for the pruner's own rows, else by a formula.

    The formula sees the importance of inputs, where there is any, under "inputs NAME".
    """
    run = RowRecord()
    base = dict.fromkeys(model.linears, BASE)
    energies = measured(model) if measurements is None else measurements
    steps = plugin.propose_row_ratios(model, base, energies, weighs_inputs, total)
    generation = next(steps)
    while True:
        run.generations.append(generation)
        answers = []
        for proposal in generation.proposals:
            assert proposal.ratios == base
            logs = logs_of(proposal)
            answers.append(Measurement(damage(logs) if logs else equal, False, 1))
            if not generation.probe:
                assert generation.windows is None
                run.full.append((answers[-1].misalignment, proposal))
        try:
            generation = steps.send(answers)
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


def bowl(at: Logs) -> Callable[[Logs], float]:
    """Return a damage that is least, 1, at a log importance."""
    return lambda logs: 1 + sum(float((logs[n] - x).square().mean()) for n, x in at.items())


def bottom(model: Layout, reads: float, own: float, norm: float | None = None) -> dict[str, Tensor]:
    """Return the log importance that exponents mean, by the formula of the docstring."""
    by_score = {"reads": reads, "own": own}
    at = {n: sum(by_score[s] * x for s, x in own_.items()) for n, own_ in known(model).items()}
    if norm is not None:
        for name in model.linears:
            score = torch.tensor(log_centred(norms(model)[name].tolist()), dtype=torch.float64)
            at[f"inputs {name}"] = norm * score
    return at  # type: ignore[return-value]


@pytest.mark.parametrize("total", [8, WINDOWS])
@pytest.mark.parametrize("reads", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("own", [0.0, -0.4])
def test_the_best_exponents_are_found(reads: float, own: float, total: int) -> None:
    model = layout()
    run = drive(RowSensitivity(), model, bowl(bottom(model, reads + 0.03, own + 0.04)), total=total)
    proposal = run.best[1]
    assert proposal.parameters == {"reads": reads, "own": own}
    wanted = bottom(model, reads, own)
    logs = logs_of(proposal)
    assert logs.keys() == wanted.keys()
    assert all(torch.allclose(logs[n], x, atol=1e-6) for n, x in wanted.items())


@pytest.mark.parametrize("total", [3, 8, WINDOWS])
@pytest.mark.parametrize("inputs", [False, True])
def test_the_pruners_own_rows_win_where_nothing_is_better(total: int, inputs: bool) -> None:
    model = layout()
    damage = bowl(bottom(model, 0.2, -0.3))
    run = drive(RowSensitivity(), model, damage, 1.0, total, weighs_inputs=inputs)
    cost, proposal = run.best
    assert (cost, proposal.parameters, proposal.importance) == (1.0, {"rows": "alike"}, {})


def test_inputs_are_weighed_after_rows_where_the_pruner_only_scores() -> None:
    model = layout()
    damage = bowl(bottom(model, 0.25, -0.4, norm=-0.45))
    run = drive(RowSensitivity(), model, damage, weighs_inputs=True)
    _, rows, inputs, best = run.generations
    assert all(bool((x.inputs == 1).all()) for p in rows.proposals for x in p.importance.values())
    assert [p.parameters["norm"] for p in inputs.proposals] == [-0.5, -0.25, 0.25, 0.5]
    (proposal,) = best.proposals
    assert proposal.parameters == {"reads": 0.25, "own": -0.4, "norm": -0.5}
    logs = logs_of(proposal)
    for name, x in bottom(model, 0.25, -0.4, norm=-0.5).items():
        assert torch.allclose(logs[name], x, atol=1e-6)


def test_inputs_stay_as_the_pruner_has_them_where_no_exponent_is_better() -> None:
    model = layout()
    run = drive(RowSensitivity(), model, bowl(bottom(model, 0.25, -0.4, 0)), weighs_inputs=True)
    assert run.best[1].parameters == {"reads": 0.25, "own": -0.4}
    assert len(run.generations) == 4
    without = drive(RowSensitivity(norm=()), model, lambda _: 0.0, weighs_inputs=True)
    assert len(without.generations) == 3


def test_exponents_on_few_windows_cannot_win_but_the_best_can() -> None:
    model = layout()
    damage = bowl(bottom(model, 0.25, -0.4))
    alike, grid, best = drive(RowSensitivity(probe_windows=5), model, damage).generations
    assert (alike.windows, alike.probe, len(alike.proposals)) == (None, False, 1)
    assert (grid.windows, grid.probe, len(grid.proposals)) == (5, True, 6)
    assert (best.windows, best.probe, len(best.proposals)) == (None, False, 1)


@pytest.mark.parametrize("total", [1, 8])
def test_exponents_on_all_windows_are_measured_once(total: int) -> None:
    model = layout()
    damage = bowl(bottom(model, 0.25, -0.4))
    run = drive(RowSensitivity(), model, damage, total=total, weighs_inputs=False)
    assert [len(g.proposals) for g in run.generations] == [1, 6]
    assert not any(g.probe or g.windows for g in run.generations)
    assert not run.generations[1].drop_early  # every cost is compared


@pytest.mark.parametrize("exponent", [3.0, 20.0])
def test_importance_stays_within_what_is_allowed(exponent: float) -> None:
    """Log energies are up to log(1e4) apart."""
    model = layout()
    energies = measured(model)
    energies[0]["rows 0.up"] = torch.tensor([1.0, 1e-8, 1.0, 1.0, 1.0], dtype=torch.float64)
    energies[0]["inputs 0.up"] = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    plugin = RowSensitivity(reads=(0.0,), own=(exponent,), norm=(exponent,))
    run = drive(plugin, model, lambda _: 1.0, measurements=energies, weighs_inputs=True)
    for generation in run.generations:
        for p in generation.proposals:
            Allocation.of(p.ratios, model, p.importance)


def test_it_ends_where_no_row_has_a_score() -> None:
    model = layout()
    alike = measured(
        model,
        {n: torch.ones(x.out_features, x.in_features) for n, x in model.linears.items()},
        {n: torch.ones(x.in_features) for n, x in model.linears.items()},
    )
    run = drive(RowSensitivity(), model, lambda _: 0.0, measurements=alike)
    assert [p.importance for g in run.generations for p in g.proposals] == [{}]


@pytest.mark.parametrize("options", [{"reads": ()}, {"own": ()}, {"probe_windows": 0}])
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
    weight, norm = weights(model), norms(model)
    found = known(model)
    assert list(found["0.up"]) == ["reads", "own"] and list(found["0.down"]) == ["own"]
    for name, x in model.linears.items():
        own, _ = slow_energies(weight[name], norm[name])
        assert found[name]["own"].tolist() == pytest.approx(log_centred(own), abs=1e-6)
        if x.fed is not None:
            _, reads = slow_energies(weight[x.fed.linear], norm[x.fed.linear])
            assert found[name]["reads"].tolist() == pytest.approx(log_centred(reads), abs=1e-6)


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
    found = row_scores(model, measured(model, weight, norm))
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
    found = row_scores(Layout((Block(0, "0", (part, down)),)), measured(model))
    assert list(found["0.up"]) == ["own"]


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
    own = row_scores(model, measured(model, weight))["0.up"]["own"]
    assert float(own.max() - own[2]) == pytest.approx(math.log(1e4))
    assert int(own.argmin()) == 2


@given(st.permutations(range(5)), st.integers(0, 9))
def test_rows_that_change_places_take_their_scores_along(order: list[int], seed: int) -> None:
    model = layout(1)
    weight, norm = weights(model, seed), norms(model, seed)
    before = row_scores(model, measured(model, weight, norm))
    weight |= {"0.up": weight["0.up"][order], "0.down": weight["0.down"][:, order]}
    norm |= {"0.down": norm["0.down"][order]}
    after = row_scores(model, measured(model, weight, norm))
    for score, values in before["0.up"].items():
        assert torch.allclose(after["0.up"][score], values[order], atol=1e-6)
    assert torch.allclose(after["0.down"]["own"], before["0.down"]["own"], atol=1e-6)


# -- the preset --------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_the_slow_preset_spends_five_times_the_papers_search_at_most(pruner: str) -> None:
    ids = windows(32, 16)
    recipe = neuroal.Recipe(sparsity=0.6, pruner=pruner, top_up="best-slow")
    report = neuroal.prune(tiny_model("llama"), None, recipe, windows=ids)
    final = 0 if pruner == "magnitude" else (2 * 3 - 1) * 32
    assert report.counts["block_runs"] - final <= 5 * 2 * 3 * 8 * 29
    assert report.sparsity["achieved"] == pytest.approx(0.6, abs=1e-4)
    assert load_top_up("best-slow").search_samples == 32
    full = [c for c in report.candidates if not c["probe"] and c["misalignment"] is not None]
    assert {c["windows"] for c in full} == {32}
    chosen = [c for c in report.candidates if c["selected"]]
    least = [c["misalignment"] for c in chosen if c["misalignment"] is not None]
    assert least[-1] == min(c["misalignment"] for c in full)
    assert [c["plugin"] for c in chosen] == ["sensitivity", "row_sensitivity"]
