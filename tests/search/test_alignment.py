"""Misalignments against a slow evaluation by hooks, and the laws that the search relies on."""

import copy
import gc
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroal import (
    Block,
    Importance,
    Layout,
    Linear,
    NeuroalError,
    Pattern,
    PluginError,
    Statistics,
    hookimpl,
)
from neuroal.cost.work import generation_work
from neuroal.layout import find
from neuroal.plugins import Plugin, load
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.pruner import BasePruner
from neuroal.pruning.targets import Rules, targets
from neuroal.search.alignment import Aligner
from neuroal.search.measurements import measure_blocks
from neuroal.search.outcomes import Outcome, Trial
from neuroal.testing import STRUCTURES, collect, tiny_model, windows
from neuroal.walk import CandidateState, Walker
from neuroal.walk.statistics import InputNorm, resolve

SPARSITY = 0.5
LAMBDAS = (0.01, 0.05, 0.1, 0.2, 0.3)


def one(role: str, choice: Any) -> Plugin:
    return load([(role, choice)])[0]


def aligner(
    model: nn.Module, metric: Any = "neuron", pruner: Any = "wanda", deviation: bool = False
) -> Aligner:
    walk = Walker(model, find(model))
    base = BasePruner(one("pruner", pruner), None, seed=0)
    return Aligner(walk, base, one("alignment", metric), deviation)


def schedule(layout: Layout, lam: float) -> Trial:
    """A linear schedule of the blocks' ratios around `SPARSITY`."""
    last = max(len(layout.blocks) - 1, 1)
    ratios = [SPARSITY - lam + 2 * lam * b / last for b in range(len(layout.blocks))]
    return of(layout, layout.per_block(ratios))


def of(
    layout: Layout, ratios: Mapping[str, float], limit: float | None = None, **rules: Any
) -> Trial:
    allocation = Allocation.of(ratios, layout)
    return Trial(targets(allocation, layout, Rules(SPARSITY, **rules), probe=True), limit)


def measure(made: Aligner, trials: Sequence[Trial], samples: int = 4) -> list[Outcome]:
    return made.measure(trials, made.walker.inputs(windows(samples), batch=3))


def totals(outcomes: Sequence[Outcome]) -> list[float]:
    return [o.measurement.misalignment for o in outcomes]


# -- against a slow evaluation ---------------------------------------------------------------


def hear(model: nn.Module, names: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """The inputs `(windows, tokens, in)` of some linears in one forward pass."""
    heard: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor]) -> None:
            heard[name] = args[0].reshape(ids.shape[0], ids.shape[1], -1).double()

        return keep

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return heard


def norms(x: Tensor) -> Tensor:
    return (x**2).sum(dim=(0, 1)).div(x.shape[0]).sqrt()


@dataclass
class Slow:
    """One candidate by the methods page: prune a copy of the model block by block."""

    dense: dict[str, Tensor]
    pruned: dict[str, Tensor]
    model: nn.Module

    @classmethod
    def run(cls, model: nn.Module, layout: Layout, trial: Trial, ids: Tensor) -> "Slow":
        made = cls({}, {}, copy.deepcopy(model))
        for block in layout.blocks:
            names = [x.name for x in block.linears]
            made.dense |= hear(made.model, names, ids)
            for x in block.linears:
                weight = made.model.get_submodule(x.name).weight
                assert isinstance(weight, nn.Parameter)
                scores = weight.detach().abs().double() * norms(made.dense[x.name])
                for row, (values, count) in enumerate(
                    zip(scores.tolist(), trial.targets[x.name].counts.tolist(), strict=True)
                ):
                    order = sorted(range(len(values)), key=lambda j: (values[j], j))
                    with torch.no_grad():
                        weight[row, order[:count]] = 0
            made.pruned |= hear(made.model, names, ids)
        return made

    def neuron(self) -> float:
        """Sum over linears of ||a / sum(a) - b / sum(b)|| / d."""
        total = 0.0
        for name, x in self.dense.items():
            a, b = norms(x), norms(self.pruned[name])
            total += float((a / a.sum() - b / b.sum()).norm()) / len(a)
        return total


@pytest.mark.parametrize("structure", STRUCTURES)
def test_neuron_misalignment_and_deviation_of_wanda(structure: str) -> None:
    model = tiny_model(structure)
    made = aligner(model, deviation=True)
    trial = schedule(made.layout, 0.1)
    (outcome,) = measure(made, [trial])
    slow = Slow.run(model, made.layout, trial, windows(4))
    assert outcome.measurement.misalignment == pytest.approx(slow.neuron(), rel=1e-4)
    assert slow.neuron() > 1e-3
    assert outcome.deviation.keys() == made.layout.linears.keys()
    for name, deviation in outcome.deviation.items():
        expected = norms(slow.dense[name]) - norms(slow.pruned[name])
        assert deviation.dtype == torch.float32
        torch.testing.assert_close(deviation.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_first_groups_deviation_is_exactly_zero(structure: str) -> None:
    made = aligner(tiny_model(structure), deviation=True)
    (outcome,) = measure(made, [schedule(made.layout, 0.1)])
    for name, x in made.layout.linears.items():
        # A parallel MLP sees the first group's input too.
        same_input = x.group == 0 or (structure == "phi" and name.endswith("fc1"))
        assert outcome.deviation[name].any() != same_input


def test_deviation_is_kept_only_if_asked_for() -> None:
    made = aligner(tiny_model("llama"))
    (outcome,) = measure(made, [schedule(made.layout, 0.1)])
    assert outcome.deviation == {}


# -- laws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["neuron", "cosine"])
def test_an_unpruned_candidate_is_exactly_aligned(metric: str) -> None:
    made = aligner(tiny_model("llama"), metric, deviation=True)
    (outcome,) = measure(made, [of(made.layout, dict.fromkeys(made.layout.linears, 0.0))])
    assert outcome.measurement.misalignment == 0.0
    assert not any(d.any() for d in outcome.deviation.values())
    assert outcome.deviation.keys() == made.layout.linears.keys()


@pytest.mark.parametrize("metric", ["neuron", "cosine"])
def test_pruning_what_is_zero_already_is_exactly_aligned(metric: str) -> None:
    model = tiny_model("llama")
    layout = find(model)
    with torch.no_grad():
        for name in layout.linears:
            model.get_parameter(f"{name}.weight")[:, ::2] = 0
    made = aligner(model, metric, "magnitude", deviation=True)
    (outcome,) = measure(made, [of(layout, dict.fromkeys(layout.linears, 0.5))])
    assert outcome.measurement.misalignment == 0.0
    assert not any(d.any() for d in outcome.deviation.values())
    assert outcome.measurement.block_runs > 0


def test_a_block_that_is_not_pruned_adds_nothing() -> None:
    model = tiny_model("llama")
    made = aligner(model, deviation=True)
    trial = of(made.layout, made.layout.per_block([0.5, 0.0, 0.5]))
    (outcome,) = measure(made, [trial])
    slow = Slow.run(model, made.layout, trial, windows(4))
    assert outcome.measurement.misalignment == pytest.approx(slow.neuron(), rel=1e-4)
    for name, x in made.layout.linears.items():
        assert outcome.deviation[name].any() == (x.group > 0 and x.block != 1)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_candidates_measured_together_are_those_measured_alone(structure: str) -> None:
    made = aligner(tiny_model(structure), deviation=True)
    trials = [schedule(made.layout, lam) for lam in LAMBDAS]
    together = measure(made, trials)
    for trial, outcome in zip(trials, together, strict=True):
        (alone,) = measure(made, [trial])
        assert alone.measurement.misalignment == outcome.measurement.misalignment
        assert all(alone.deviation[n].equal(d) for n, d in outcome.deviation.items())


def test_candidates_that_agree_up_to_a_block_are_those_measured_alone() -> None:
    """What two candidates have in common runs once; the result is the same to the bit."""
    made = aligner(tiny_model("llama", blocks=4), deviation=True)
    choices = [
        (0.25, 0.75, 0.5, 0.5),
        (0.25, 0.75, 0.5, 0.25),
        (0.25, 0.75, 0.125, 0.5),
        (0.25, 0.75, 0.5, 0.5),
        (0.0, 0.75, 0.5, 0.5),
        (0.0, 0.0, 0.5, 0.5),
    ]
    trials = [of(made.layout, made.layout.per_block(list(c))) for c in choices]
    before = made.walker.block_runs
    together = measure(made, trials)
    runs = made.walker.block_runs - before
    assert sum(o.measurement.block_runs for o in together) == runs
    alone = [measure(made, [trial])[0] for trial in trials]
    assert totals(together) == totals(alone)
    for a, b in zip(alone, together, strict=True):
        assert all(a.deviation[n].equal(d) for n, d in b.deviation.items())
    assert [o.measurement.block_runs // 4 for o in alone] == [8, 8, 8, 8, 7, 6]
    # The second one's own is its last block pruned; the third one's its third block pruned and its
    # last one both ways; the fourth is the first over again; of the fifth only the first block,
    # not pruned, runs once; the last has that block in common with it.
    assert [o.measurement.block_runs // 4 for o in together] == [8, 1, 3, 0, 7, 5]


def test_same_counts_with_ties_the_other_way_round_are_not_shared() -> None:
    """Equal scores: the published rule under row ratios prunes the other end of a row."""
    made = aligner(tiny_model("llama"), pruner=Flat())
    layout = made.layout
    ratios = dict.fromkeys(layout.linears, 0.5)
    rows = {n: torch.full((x.out_features,), 0.5) for n, x in layout.linears.items()}
    rules = Rules(SPARSITY, "paper")
    trials = [Trial(targets(Allocation.of(r, layout), layout, rules)) for r in (ratios, rows)]
    together = totals(measure(made, trials))
    assert together == [totals(measure(made, [t]))[0] for t in trials]
    assert together[0] != together[1]


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_candidates_that_differ_in_importance_alone_are_told_apart(pruner: str) -> None:
    made = aligner(tiny_model("llama"), pruner=pruner)
    layout = made.layout
    ratios = dict.fromkeys(layout.linears, 0.5)
    up = layout.blocks[1].linears[-2]
    rising = torch.linspace(1, 4, up.out_features)
    ones = torch.ones(up.out_features)
    weighed = [{}, *({up.name: Importance(rows)} for rows in (ones, rising, 1 / rising))]
    if pruner == "wanda":  # whose inputs can be weighed
        weighed.append({up.name: Importance(ones, torch.linspace(1, 4, up.in_features))})
    allocations = [Allocation.of(ratios, layout, importance) for importance in weighed]
    trials = [Trial(targets(x, layout, Rules(SPARSITY))) for x in allocations]
    together = totals(measure(made, trials))
    assert together == [totals(measure(made, [t]))[0] for t in trials]
    assert len(set(together)) == len(weighed)


@dataclass(frozen=True, eq=False)
class Flat:
    """Every weight is worth the same."""

    @hookimpl
    def score_weights(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)


def test_batches_change_only_rounding() -> None:
    made = aligner(tiny_model("llama"))
    trial = schedule(made.layout, 0.1)
    by_size = [
        made.measure([trial], made.walker.inputs(windows(4), batch))[0].measurement.misalignment
        for batch in (1, 3, 4)
    ]
    assert by_size == pytest.approx([by_size[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("rules", [{"comparison": "matrix"}, {"pattern": Pattern(2, 4)}])
def test_other_comparisons_and_patterns(rules: dict[str, Any]) -> None:
    made = aligner(tiny_model("llama"))
    ratios = dict.fromkeys(made.layout.linears, 0.5)
    (outcome,) = measure(made, [of(made.layout, ratios, **rules)])
    assert outcome.measurement.misalignment > 0


# -- what is run -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SquaredLogits:
    """Mean squared difference of the logits."""

    @hookimpl
    def measure_output(self, dense_logits: Tensor, pruned_logits: Tensor) -> Tensor:
        return (dense_logits - pruned_logits).square().mean()


@dataclass(frozen=True, eq=False)
class SquaredError:
    """Sum of the squared differences of the inputs, which is all that it reads."""

    @hookimpl
    def required_statistics(self) -> set[str]:
        return {"input_error"}

    @hookimpl
    def measure_linear(self, pruned: Statistics) -> Tensor:
        return pruned.input_error.sum()


def generation_runs(
    metric: Plugin, pruner: Plugin, deviation: bool, blocks: int, candidates: int, windows: int = 4
) -> int:
    sizes = {"blocks": blocks, "candidates": candidates, "windows": windows}
    return generation_work(metric, pruner, deviation, **sizes).block_runs


@pytest.mark.parametrize("metric", ["neuron", SquaredLogits(), SquaredError()])
@pytest.mark.parametrize("pruner", ["wanda", "magnitude"])
@pytest.mark.parametrize("deviation", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_block_runs_are_the_formula(metric: Any, pruner: str, deviation: bool, blocks: int) -> None:
    made = aligner(tiny_model("opt", blocks=blocks), metric, pruner, deviation)
    if blocks == 1:
        values = [0.3 + lam for lam in LAMBDAS]
        trials = [of(made.layout, made.layout.per_block([r])) for r in values]
    else:
        trials = [schedule(made.layout, lam) for lam in LAMBDAS]
    if made.metric.has("measure_output"):
        measure(made, trials[:1])  # the dense reference is made once
    before = made.walker.block_runs
    outcomes = measure(made, trials)
    runs = made.walker.block_runs - before
    formula = generation_runs(made.metric, made.pruner.pruner, deviation, blocks, len(LAMBDAS))
    assert runs == formula == sum(o.measurement.block_runs for o in outcomes)


def test_block_runs_by_hand() -> None:
    # 3 blocks, 5 candidates, 4 windows: dense 1 + 5 + 5 and pruned 3 * 5 times, 4 windows each.
    neuron, wanda, magnitude = (
        one("alignment", "neuron"),
        one("pruner", "wanda"),
        one("pruner", "magnitude"),
    )
    assert generation_runs(neuron, wanda, False, 3, 5) == 4 * (11 + 15)
    # Nothing is read of the dense run, nor of the last block but its output.
    output = one("alignment", SquaredLogits())
    assert generation_runs(output, magnitude, False, 3, 5) == 4 * 15
    assert generation_runs(output, wanda, False, 3, 5) == 4 * (11 + 15)
    # With the row step's deviation everything is read.
    assert generation_runs(output, magnitude, True, 3, 5) == 4 * (11 + 15)


def test_the_last_linears_of_the_dense_run_are_not_run() -> None:
    model = tiny_model("llama")
    made = aligner(model)
    calls = dict.fromkeys(made.layout.linears, 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        model.get_submodule(name).register_forward_hook(count(name))
    made.measure([schedule(made.layout, 0.1)], made.walker.inputs(windows(2), batch=2))
    for name, x in made.layout.linears.items():
        # Dense and pruned; the last linear of a block only pruned, that of the last block never.
        is_last = name.endswith("down_proj")
        assert calls[name] == (2 if not is_last else 1 if x.block < 2 else 0), name


def test_the_progress_ticks_once_per_candidate_and_block() -> None:
    made = aligner(tiny_model("llama"))
    ticks: list[None] = []
    trials = [schedule(made.layout, lam) for lam in LAMBDAS]
    made.measure(trials, made.walker.inputs(windows(1)), lambda: ticks.append(None))
    assert len(ticks) == len(LAMBDAS) * 3


def test_dense_runs_are_let_go_as_soon_as_nobody_waits_for_them() -> None:
    """The dense inputs of all candidates at once would be far more than their hidden states."""
    made = aligner(tiny_model("llama"), SquaredError())
    living: list[int] = []
    seen: list[weakref.ref[Any]] = []
    run = made.walker.run

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        if kwargs.get("keep_inputs"):
            seen.append(weakref.ref(result))
            living.append(sum(ref() is not None for ref in seen))
        return result

    made.walker.run = watched  # type: ignore[method-assign]
    gc.collect()
    measure(made, [schedule(made.layout, lam) for lam in LAMBDAS])
    assert len(living) == 1 + 2 * len(LAMBDAS)
    assert max(living) == 1


# -- dropping --------------------------------------------------------------------------------


def test_dropping_has_the_same_winner_and_less_work() -> None:
    made = aligner(tiny_model("llama", blocks=4))
    trials = [schedule(made.layout, lam) for lam in (*LAMBDAS, -0.3, -0.1, 0.45)]
    exhaustive = totals(measure(made, trials))
    best, winner = float("inf"), None
    runs, dropped = 0, 0
    for i, trial in enumerate(trials):
        limit = None if winner is None else best
        (outcome,) = measure(made, [Trial(trial.targets, limit)])
        measurement = outcome.measurement
        runs += measurement.block_runs
        if measurement.dropped:
            dropped += 1
            assert best < measurement.misalignment <= exhaustive[i]
        else:
            assert measurement.misalignment == exhaustive[i]
            if measurement.misalignment < best:
                best, winner = measurement.misalignment, i
    assert winner == exhaustive.index(min(exhaustive))
    assert dropped > 0
    full = generation_runs(made.metric, made.pruner.pruner, False, 4, 1)
    assert runs < full * len(trials)


def test_only_what_is_strictly_greater_is_dropped() -> None:
    made = aligner(tiny_model("llama"))
    trial = schedule(made.layout, 0.1)
    (total,) = totals(measure(made, [trial]))
    for limit, dropped in ((total, False), (math.nextafter(total, 0), True)):
        (outcome,) = measure(made, [Trial(trial.targets, limit)])
        assert outcome.measurement.dropped == dropped
        assert outcome.measurement.misalignment == total


def test_a_dropped_candidate_disturbs_no_other() -> None:
    made = aligner(tiny_model("llama"))
    trials = [schedule(made.layout, lam) for lam in LAMBDAS]
    expected = totals(measure(made, trials))
    limited = [Trial(t.targets, 0.0 if i in (0, 2) else None) for i, t in enumerate(trials)]
    outcomes = measure(made, limited)
    for i, outcome in enumerate(outcomes):
        if i in (0, 2):
            assert outcome.measurement.dropped
            assert 0 < outcome.measurement.misalignment < expected[i]
        else:
            assert outcome.measurement.misalignment == expected[i]


# -- other metrics ---------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_output_metric_is_the_mean_over_windows(structure: str) -> None:
    model, ids = tiny_model(structure), windows(4)
    made = aligner(model, SquaredLogits())
    trials = [schedule(made.layout, lam) for lam in (0.1, 0.2)]
    for trial, total in zip(trials, totals(measure(made, trials)), strict=True):
        slow = Slow.run(model, made.layout, trial, ids)
        with torch.no_grad():
            gap = model(input_ids=ids).logits.double() - slow.model(input_ids=ids).logits.double()
        assert total == pytest.approx(float(gap.square().mean()), rel=1e-4)


def test_an_output_metric_is_never_dropped() -> None:
    made = aligner(tiny_model("llama"), SquaredLogits())
    trial = schedule(made.layout, 0.1)
    (outcome,) = measure(made, [Trial(trial.targets, 0.0)])
    assert not outcome.measurement.dropped
    assert outcome.measurement.misalignment > 0


def test_output_metric_of_an_unpruned_candidate_is_zero() -> None:
    made = aligner(tiny_model("llama"), SquaredLogits())
    (outcome,) = measure(made, [of(made.layout, dict.fromkeys(made.layout.linears, 0.0))])
    assert outcome.measurement.misalignment == 0.0


def test_a_metric_of_the_activations_themselves() -> None:
    model, ids = tiny_model("llama"), windows(4)
    made = aligner(model, SquaredError(), "magnitude")
    trial = of(made.layout, dict.fromkeys(made.layout.linears, 0.25))
    (outcome,) = measure(made, [trial])
    # By magnitude: the inputs do not matter to the masks, so that Wanda's slow norms are left out.
    model_pruned = copy.deepcopy(model)
    total = 0.0
    for block in made.layout.blocks:
        names = [x.name for x in block.linears]
        dense = hear(model_pruned, names, ids)
        for x in block.linears:
            weight = model_pruned.get_parameter(f"{x.name}.weight")
            count = x.in_features // 4
            gone = weight.detach().abs().argsort(dim=1, stable=True)[:, :count]
            with torch.no_grad():
                weight.scatter_(1, gone, 0)
        after = hear(model_pruned, names, ids)
        total += sum(float((dense[n] - after[n]).square().sum()) / 4 for n in names)
    assert outcome.measurement.misalignment == pytest.approx(total, rel=1e-4)


def test_a_pruners_own_norm_serves_the_metric_too() -> None:
    plain = measure(aligner(tiny_model("llama")), [schedule(find(tiny_model("llama")), 0.1)])
    made = aligner(tiny_model("llama"), pruner=Louder())
    (outcome,) = measure(made, [schedule(made.layout, 0.1)])
    # Twice the norm everywhere: the shares, and Wanda's order, are the same.
    assert outcome.measurement.misalignment == pytest.approx(totals(plain)[0], rel=1e-5)


@dataclass(frozen=True)
class DoubleNorm(InputNorm):
    def result(self, state: dict[str, Tensor]) -> Tensor:
        return 2 * super().result(state)


@dataclass(frozen=True, eq=False)
class Louder:
    @hookimpl
    def required_statistics(self) -> set[DoubleNorm]:
        return {DoubleNorm()}

    @hookimpl
    def score_weights(self, weight: Tensor, statistics: Statistics) -> Tensor:
        return weight.abs() * statistics.input_norm


# -- wrong answers ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answer:
    """A metric that answers what it is told, at the linears of block 1."""

    kind: str = "nan"

    @hookimpl
    def required_statistics(self) -> set[str]:
        return {"input_norm"}

    @hookimpl
    def measure_linear(self, dense: Statistics, linear: Linear) -> Any:
        if linear.block != 1:
            return torch.tensor(1.0)
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "error":
            raise ValueError("no idea")
        return {
            "nan": torch.tensor(torch.nan),
            "infinity": torch.tensor(torch.inf),
            "negative": torch.tensor(-0.5),
            "vector": torch.ones(3),
            "number": 1.0,
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("nan", "returned NaN, infinity or a number below 0"),
        ("infinity", "returned NaN, infinity or a number below 0"),
        ("negative", "returned NaN, infinity or a number below 0"),
        ("vector", r"returned shape \(3,\), not a 0-d tensor"),
        ("number", "returned float, not a 0-d tensor"),
        ("error", "ValueError: no idea"),
    ],
)
def test_a_wrong_answer_is_blamed_on_the_metric(kind: str, problem: str) -> None:
    made = aligner(tiny_model("llama"), Answer(kind))
    with pytest.raises(PluginError, match=rf"alignment 'answer' .*hook measure_linear: {problem}"):
        measure(made, [schedule(made.layout, 0.1)])


def test_a_metric_that_names_no_statistic_is_refused() -> None:
    @dataclass(frozen=True, eq=False)
    class Forgetful:
        @hookimpl
        def measure_linear(self, dense: Any) -> Any:
            return dense.input_norm.sum()

    with pytest.raises(PluginError, match="required_statistics: names nothing for measure_linear"):
        aligner(tiny_model("llama"), Forgetful())


@pytest.mark.parametrize(
    ("kind", "raised"), [("error", PluginError), ("interrupt", KeyboardInterrupt)]
)
def test_the_model_is_as_it_was_whatever_happens(kind: str, raised: type[BaseException]) -> None:
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = aligner(model, Answer(kind))
    with pytest.raises(raised):
        measure(made, [schedule(made.layout, 0.1)])
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    # And the walker goes on as if nothing had happened.
    made.metric = one("alignment", "neuron")
    fresh = aligner(tiny_model("llama"))
    trial = schedule(made.layout, 0.1)
    assert totals(measure(made, [trial])) == totals(measure(fresh, [trial]))


def test_a_search_leaves_the_weights_alone() -> None:
    model = tiny_model("mistral")
    before = {k: (v.clone(), v.data_ptr()) for k, v in model.state_dict().items()}
    made = aligner(model, deviation=True)
    measure(made, [schedule(made.layout, lam) for lam in LAMBDAS])
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name][0]) and tensor.data_ptr() == before[name][1]


# -- measure_block ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measuring:
    """Hands back what it is given."""

    reads: tuple[str, ...] = ("input_norm",)

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        return frozenset(self.reads)

    @hookimpl
    def measure_block(
        self, block: Block, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics]
    ) -> dict[str, Tensor]:
        made = {f"weight {n}": w.clone() for n, w in weights.items()}
        for name, s in statistics.items():
            made |= {f"{key} {name}": value for key, value in s.tensors().items()}
        return made | {"index": torch.tensor(block.index)}

    @hookimpl
    def propose_block_ratios(self) -> Any:
        yield from ()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_block_is_measured_on_the_dense_model(structure: str) -> None:
    model, ids = tiny_model(structure), windows(5)
    walk = Walker(model, find(model))
    plugins = [one("block_ratios", Measuring()), one("block_ratios", Measuring(("gram",)))]
    ticks: list[None] = []
    answers = measure_blocks(walk, walk.inputs(ids, 2), plugins, lambda: ticks.append(None))
    assert len(answers) == 2 and len(ticks) == 3
    assert walk.block_runs == 3 * 5
    heard = hear(model, list(walk.layout.linears), ids)
    for answer in answers:
        assert [int(a["index"]) for a in answer] == [0, 1, 2]
        for name, x in walk.layout.linears.items():
            made = answer[x.block]
            assert made[f"weight {name}"].equal(model.get_parameter(f"{name}.weight"))
            expected = collect(heard[name].float(), "input_norm", "gram")
            # What one asks for, every one is given: they share the walk.
            for key in ("input_norm", "gram"):
                torch.testing.assert_close(made[f"{key} {name}"], expected[key])


def test_measuring_weights_alone_needs_no_last_block() -> None:
    model = tiny_model("llama")
    walk = Walker(model, find(model))
    plugin = one("block_ratios", Measuring(()))
    (answers,) = measure_blocks(walk, walk.inputs(windows(5)), [plugin])
    assert walk.block_runs == 2 * 5
    assert all(a.keys() == {"index", *(f"weight {n}" for n in names)} for a, names in zip(
        answers, ([x.name for x in b.linears] for b in walk.layout.blocks), strict=True
    ))  # fmt: skip


def test_no_statistic_can_compare_in_the_dense_walk() -> None:
    model = tiny_model("llama")
    walk = Walker(model, find(model))
    plugin = one("block_ratios", Measuring(("input_error",)))
    with pytest.raises(NeuroalError, match="no statistic can compare"):
        measure_blocks(walk, walk.inputs(windows(2)), [plugin])


# -- probes around a candidate ----------------------------------------------------------------


def around(layout: Layout, block: int, by: float) -> tuple[Trial, Trial]:
    """A schedule, and a probe that prunes one block's first linear otherwise, around it."""
    center = schedule(layout, 0.1)
    first = layout.blocks[block].linears[0].name
    ratios = layout.per_block([SPARSITY - 0.1 + 0.2 * b / 3 for b in range(len(layout.blocks))])
    changed = of(layout, dict(ratios) | {first: ratios[first] + by})
    return center, replace(changed, first=center.targets)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_a_probe_keeps_the_weights_of_what_it_is_around(structure: str, pruner: str) -> None:
    model = tiny_model(structure, blocks=4)
    made = aligner(model, "output_kl", pruner)
    center, probe = around(made.layout, 1, 0.2)
    ids = windows(4)

    def pruned(trial: Trial, blocks: Sequence[int], begin: nn.Module) -> nn.Module:
        """Prune some blocks in turn, by statistics of what those before them hand on."""
        copied = copy.deepcopy(begin)
        walk = Walker(copied, made.layout)
        for b in blocks:
            block = made.layout.blocks[b]
            inputs = walk.inputs(ids)
            state = CandidateState.start(inputs)
            statistics = {}
            for before in made.layout.blocks[: b + 1]:
                module = copied.get_submodule(before.name)
                needed = resolve(made.pruner.pruner.required_statistics())
                ran = walk.run(before, module, inputs, state, needed)
                state, statistics = ran.state or state, ran.statistics
            module = copied.get_submodule(block.name)
            new = made.pruner.prune_block(block, module, statistics, trial.targets)
            for name, weight in new.items():
                copied.get_submodule(name).weight.data.copy_(weight)
        return copied

    whole = pruned(center, range(4), model)
    mixed = copy.deepcopy(whole)
    changed = pruned(probe, [1], pruned(center, [0], model))
    for x in made.layout.blocks[1].linears:
        mixed.get_submodule(x.name).load_state_dict(changed.get_submodule(x.name).state_dict())
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (model, mixed))
    slow = float((p.exp() * (p - q)).sum(-1).mean())
    assert totals(measure(made, [probe]))[0] == pytest.approx(slow, rel=1e-4)
    assert (
        totals(measure(made, [probe]))[0] != totals(measure(made, [replace(probe, first=None)]))[0]
    )


def test_a_probe_around_itself_is_what_it_is_alone() -> None:
    made = aligner(tiny_model("llama", blocks=4), "output_kl")
    center = schedule(made.layout, 0.1)
    alone, inside = measure(made, [center, replace(center, first=center.targets)])
    assert inside.measurement.misalignment == alone.measurement.misalignment


def test_probes_around_a_candidate_run_a_block_once() -> None:
    made = aligner(tiny_model("llama", blocks=4), "output_kl", deviation=True)
    probes = [around(made.layout, b, by)[1] for b in range(4) for by in (-0.2, 0.2)]
    center = probes[0].first
    probes = [replace(p, first=center) for p in probes]
    assert center is not None
    measure(made, probes[:1])  # the dense output
    outcomes = measure(made, [Trial(center, first=center), *probes])
    runs = [o.measurement.block_runs for o in outcomes]
    # Every probe: what is from its block on, once. The candidate itself, 4 blocks twice.
    assert runs == [4 * 8, *(4 * n for n in (4, 4, 3, 3, 2, 2, 1, 1))]
    assert [bool(o.deviation) for o in outcomes] == [True] + 8 * [False]
    # Where another process measures it, it walks along and counts for nobody.
    before = made.walker.block_runs
    without = measure(made, probes)
    assert made.walker.block_runs - before == sum(runs)
    assert [o.measurement for o in without] == [o.measurement for o in outcomes[1:]]


def test_a_metric_of_linears_sees_the_inputs_of_a_probe_around_a_candidate() -> None:
    made = aligner(tiny_model("llama", blocks=4))
    center, probe = around(made.layout, 3, 0.2)
    # Nothing is behind the last block: what is kept is what would have been found.
    assert totals(measure(made, [probe])) == totals(measure(made, [replace(probe, first=None)]))
    _, early = around(made.layout, 0, 0.2)
    cost = totals(measure(made, [early, replace(early, first=None), center]))
    assert cost[0] != cost[1] and cost[0] != cost[2]
