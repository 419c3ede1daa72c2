"""The search: what strategies hear, who wins, and what is measured again or not at all."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from neuroal import (
    Generation,
    Importance,
    Layout,
    Measurement,
    PluginError,
    Proposal,
    RowRatiosTraits,
    hookimpl,
)
from neuroal.cost.work import generation_work
from neuroal.distributed import Team
from neuroal.layout import find
from neuroal.plugins import Plugin, load
from neuroal.pruning.pruner import BasePruner
from neuroal.pruning.targets import Rules, targets
from neuroal.search.alignment import Aligner
from neuroal.search.outcomes import Outcome
from neuroal.search.topup import Candidate, Decision, TopUpSearch
from neuroal.testing import layout, tiny_model, windows
from neuroal.walk import Walker

FOUND = layout(2, {"a": (10, 10)})  # ratios in whole percents are whole counts
ALL = 8  # search windows
Steps = Generator[Generation, list[Measurement], Proposal | None]


@dataclass
class Distance:
    """Stands in for `Aligner`: the misalignment is the first block's distance from `best`.

    On fewer than all windows it is ten times smaller, so that costs on different windows show.
    """

    best: float = 0.3
    calls: list[tuple[int, list[float], list[float | None]]] = field(default_factory=list)

    def measure(self, trials: Any, inputs: Any, tick: Any = int, mark: Any = None) -> Any:
        ratios = [t.targets["blocks.0.a"].ratio for t in trials]
        self.calls.append((inputs, [round(r, 6) for r in ratios], [t.limit for t in trials]))
        made = []
        for trial, ratio in zip(trials, ratios, strict=True):
            tick()
            cost = round(abs(ratio - self.best), 6) * (1 if inputs == ALL else 0.1)
            dropped = trial.limit is not None and cost > trial.limit
            runs = 1 if dropped else 2
            shown = trial.limit + 1e-9 if dropped and trial.limit is not None else cost
            deviation = {"blocks.0.a": torch.tensor([ratio])}
            made.append(Outcome(Measurement(shown, dropped, runs), deviation))
        return made

    @property
    def measured(self) -> list[list[float]]:
        return [ratios for _, ratios, _ in self.calls]


def search(aligner: Any, journal: Any = None, seed: int = 0) -> TopUpSearch:
    return TopUpSearch(
        aligner=aligner,
        layout=FOUND,
        rules=Rules(0.5),
        inputs=lambda n: n,  # type: ignore[arg-type, return-value]
        windows=ALL,
        journal=journal or (lambda key, make: make()),
        progress=lambda title, total: int,
        seed=seed,
    )


def proposal(ratio: float, **more: Any) -> Proposal:
    """The first block's ratio; the second block's makes the mean 0.5."""
    return Proposal({"blocks.0.a": ratio, "blocks.1.a": 1 - ratio}, {"r": ratio}, **more)


def generation(*ratios: float, **more: Any) -> Generation:
    return Generation([proposal(r) for r in ratios], **more)


def strategy(steps: Callable[[], Steps], name: str = "Strategy") -> Plugin:
    """A plugin whose strategy is a generator function."""

    def propose_block_ratios(self: Any) -> Any:
        return steps()

    hooks = {"propose_block_ratios": hookimpl(propose_block_ratios)}
    kind: Any = dataclass(frozen=True, eq=False)(type(name, (), hooks))
    return load([("block_ratios", kind())])[0]


def choose(
    aligner: Any, *plugins: Plugin, needs_deviation: bool = False, journal: Any = None
) -> Decision:
    return search(aligner, journal).choose_blocks(plugins, {}, needs_deviation)


def winner(choice: Decision) -> Candidate:
    (selected,) = [c for c in choice.candidates if c.selected]
    return selected


# -- one strategy ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Twin(Team):
    """Two processes, of which the other one finds what this one finds."""

    size: int = 2

    def exchange(self, data: bytes) -> list[bytes]:
        return [data, data]


class Alike(Distance):
    """Candidates that begin alike share their deviation."""

    def measure(self, trials: Any, inputs: Any, tick: Any = int, mark: Any = None) -> Any:
        made = super().measure(trials, inputs, tick)
        shared = {"blocks.0.a": torch.ones(3)}
        return [replace(outcome, deviation=shared) for outcome in made]


def test_processes_tell_each_other_of_candidates_that_begin_alike() -> None:
    def steps() -> Steps:
        heard = yield generation(0.1, 0.2, 0.35, 0.4)
        assert [m.misalignment for m in heard] == [0.2, 0.2, 0.05, 0.05]
        return None

    made = replace(search(Alike()), team=Twin())
    choice = made.choose_blocks([strategy(steps)], {}, needs_deviation=True)
    assert choice.allocation.ratios["blocks.0.a"] == 0.35
    assert choice.deviation["blocks.0.a"].tolist() == [1.0, 1.0, 1.0]


@dataclass
class Reuse(Distance):
    """Keeps which trials reuse whose weights."""

    heard: list[tuple[Any, Any]] = field(default_factory=list)

    def measure(self, trials: Any, inputs: Any, tick: Any = int, mark: Any = None) -> Any:
        self.heard = [(t.targets, t.first) for t in trials]
        return super().measure(trials, inputs, tick)


def test_all_of_a_generation_that_reuses_its_first_weights_are_told_so() -> None:
    def steps(reuse: bool) -> Steps:
        yield generation(0.3, 0.4, 0.5, probe=True, reuse_first_weights=reuse)
        made = keys[-1]
        yield generation(0.35)
        assert keys[-1] != made
        return None

    keys: list[str] = []

    def journal(key: str, make: Any) -> Any:
        keys.append(key)
        outcomes = make()
        if len(keys) % 2:
            first = aligner.heard[0][0]
            assert all(around is (first if len(keys) == 1 else None) for _, around in aligner.heard)
        return outcomes

    aligner = Reuse()
    choose(aligner, strategy(lambda: steps(True)), journal=journal)
    choose(aligner, strategy(lambda: steps(False)), journal=journal)
    assert keys[0] != keys[2] and keys[1] == keys[3]  # what is measured otherwise is kept apart


def test_the_least_misaligned_of_one_generation_wins() -> None:
    def steps() -> Steps:
        heard = yield generation(0.1, 0.35, 0.5)
        assert [m.misalignment for m in heard] == [0.2, 0.05, 0.2]
        assert [(m.dropped, m.block_runs) for m in heard] == [(False, 2)] * 3
        return None

    choice = choose(Distance(), strategy(steps))
    assert choice.allocation.ratios == {"blocks.0.a": 0.35, "blocks.1.a": 0.65}
    common = Candidate("block_ratios", "strategy", {}, None, windows=ALL)
    assert choice.candidates == (
        replace(common, parameters={"r": 0.1}, misalignment=0.2),
        replace(common, parameters={"r": 0.35}, misalignment=0.05, selected=True),
        replace(common, parameters={"r": 0.5}, misalignment=0.2),
    )


def test_the_first_of_equals_wins() -> None:
    def steps() -> Steps:
        yield generation(0.9, 0.4, 0.2, 0.4)
        return None

    choice = choose(Distance(), strategy(steps))
    assert [c.selected for c in choice.candidates] == [False, True, False, False]


def test_several_generations_compete_and_later_ones_are_limited_by_the_best() -> None:
    def steps() -> Steps:
        yield generation(0.5, 0.4)
        heard = yield generation(0.35, 0.9, 0.4)
        assert [m.dropped for m in heard] == [False, True, False]
        yield generation(0.39, 0.36, drop_early=False)
        return None

    aligner = Distance()
    choice = choose(aligner, strategy(steps))
    assert winner(choice).parameters == {"r": 0.35}
    limits = [limits for _, _, limits in aligner.calls]
    # Nothing is finished before the first generation; without `drop_early` costs are exact.
    assert limits == [[None, None], [pytest.approx(0.1)] * 3, [None, None]]
    assert [c.dropped for c in choice.candidates].count(True) == 1


def test_an_earlier_generation_may_win() -> None:
    def steps() -> Steps:
        yield generation(0.31)
        yield generation(0.4, 0.5)
        return None

    assert winner(choose(Distance(), strategy(steps))).parameters == {"r": 0.31}


def test_an_evolutionary_loop_climbs_on_the_costs_that_it_hears() -> None:
    def steps() -> Steps:
        parent, step = 0.8, 0.16
        (heard,) = yield generation(parent)
        cost = heard.misalignment
        for _ in range(20):
            near = [round(parent + step, 2), round(parent - step, 2)]
            costs = yield generation(*near)
            best, ratio = min((m.misalignment, r) for m, r in zip(costs, near, strict=True))
            if best < cost:
                cost, parent = best, ratio
            else:
                step /= 2
            if step < 0.01:
                break
        return proposal(parent)

    aligner = Distance(best=0.27)
    choice = choose(aligner, strategy(steps))
    assert winner(choice).parameters == {"r": 0.27}
    assert winner(choice).misalignment == 0
    # The returned proposal had been measured: no more is done about it.
    assert len(choice.candidates) == sum(len(ratios) for ratios in aligner.measured)


# -- probes ----------------------------------------------------------------------------------


def test_probes_are_measured_as_given_and_cannot_win() -> None:
    def steps() -> Steps:
        probes = [Proposal({"blocks.0.a": r, "blocks.1.a": 0.0}, {"probe": r}) for r in (0.3, 0.8)]
        heard = yield Generation(probes, probe=True)
        assert [m.misalignment for m in heard] == [0.0, 0.5]
        yield generation(0.6)
        yield Generation([replace(probes[0], parameters={"again": True})], probe=True)
        yield generation(0.5)
        return None

    aligner = Distance()
    choice = choose(aligner, strategy(steps))
    assert aligner.measured == [[0.3, 0.8], [0.6], [0.3], [0.5]]
    # A probe's exact cost is what it is measured for; and its cost limits nobody.
    assert [limits for _, _, limits in aligner.calls] == [[None, None], [None], [None], [0.3]]
    assert winner(choice).parameters == {"r": 0.5}
    assert [c.probe for c in choice.candidates] == [True, True, False, True, False]


def test_what_is_no_probe_is_projected_on_the_budget() -> None:
    def steps() -> Steps:
        yield Generation([Proposal({"blocks.0.a": 0.2, "blocks.1.a": 0.4})])
        return None

    aligner = Distance()
    choose(aligner, strategy(steps))
    assert aligner.measured == [[0.4]]


def test_probes_alone_are_an_error() -> None:
    def steps() -> Steps:
        yield generation(0.3, probe=True)
        return None

    with pytest.raises(PluginError, match=r"block_ratios 'strategy' .* without a proposal that"):
        choose(Distance(), strategy(steps))


def test_a_probes_ratios_can_be_returned_and_are_projected() -> None:
    def steps() -> Steps:
        ratios = {"blocks.0.a": 0.3, "blocks.1.a": 0.5}
        yield Generation([Proposal(ratios)], probe=True)
        return Proposal(ratios)

    aligner = Distance()
    choice = choose(aligner, strategy(steps), needs_deviation=True)
    assert aligner.measured == [[0.3], [0.4]]
    assert [(c.probe, c.selected) for c in choice.candidates] == [(True, False), (False, True)]


# -- returned proposals ----------------------------------------------------------------------


def test_a_returned_proposal_wins_over_better_ones() -> None:
    def steps() -> Steps:
        yield generation(0.3, 0.7)
        return proposal(0.7)

    aligner = Distance()
    choice = choose(aligner, strategy(steps))
    assert winner(choice).parameters == {"r": 0.7}
    assert winner(choice).misalignment == pytest.approx(0.4)
    assert len(choice.candidates) == 2 and len(aligner.calls) == 1


def test_a_returned_proposal_is_not_measured_unless_something_reads_it() -> None:
    def steps() -> Steps:
        yield from ()
        return proposal(0.7)

    aligner = Distance()
    choice = choose(aligner, strategy(steps))
    assert aligner.calls == []
    expected = Candidate("block_ratios", "strategy", {"r": 0.7}, None, selected=True)
    assert choice.candidates == (expected,)
    assert choice.allocation.ratios["blocks.0.a"] == 0.7
    assert choice.deviation == {}

    choice = choose(aligner, strategy(steps), needs_deviation=True)
    assert aligner.measured == [[0.7]]
    assert winner(choice).misalignment == pytest.approx(0.4)
    assert choice.deviation["blocks.0.a"].tolist() == [pytest.approx(0.7)]


def test_without_an_aligner_what_is_returned_at_once_is_enough() -> None:
    def steps() -> Steps:
        yield from ()
        return proposal(0.7)

    assert winner(choose(None, strategy(steps))).parameters == {"r": 0.7}


def test_a_dropped_proposal_that_is_returned_is_measured_to_the_end_where_it_counts() -> None:
    def steps() -> Steps:
        yield generation(0.3)
        (heard,) = yield generation(0.7)
        assert heard.dropped
        return proposal(0.7)

    def other() -> Steps:
        yield generation(0.6)
        return None

    aligner = Distance()
    choice = choose(aligner, strategy(steps), strategy(other, "Other"))
    assert aligner.calls[-1] == (ALL, [0.7], [None])
    assert winner(choice).parameters == {"r": 0.6}


# -- windows ---------------------------------------------------------------------------------


def test_the_most_windows_decide_even_if_fewer_cost_less() -> None:
    def steps() -> Steps:
        first = yield generation(0.31, 0.5, windows=2)
        assert [m.misalignment for m in first] == pytest.approx([0.001, 0.02])
        second = yield generation(0.5, 0.8)
        # What was finished on other windows limits nobody.
        assert [m.misalignment for m in second] == pytest.approx([0.2, 0.5])
        yield generation(0.32, windows=4)
        return None

    aligner = Distance()
    choice = choose(aligner, strategy(steps))
    assert [w for w, _, _ in aligner.calls] == [2, ALL, 4]
    assert [limits for _, _, limits in aligner.calls] == [[None] * 2, [None] * 2, [None]]
    assert winner(choice).parameters == {"r": 0.5}
    assert [c.windows for c in choice.candidates] == [2, 2, ALL, ALL, 4]


def test_more_windows_than_there_are_are_all_of_them() -> None:
    def steps() -> Steps:
        yield generation(0.5, windows=1000)
        yield generation(0.4)
        return None

    aligner = Distance()
    choice = choose(aligner, strategy(steps))
    assert [w for w, _, _ in aligner.calls] == [ALL, ALL]
    assert aligner.calls[1][2] == [pytest.approx(0.2)]
    assert winner(choice).windows == ALL


def test_a_winner_on_few_windows_is_measured_on_all_of_them_for_its_deviation() -> None:
    def steps() -> Steps:
        yield generation(0.5, 0.4, windows=2)
        return None

    aligner = Distance()
    choice = choose(aligner, strategy(steps), needs_deviation=True)
    assert [(w, ratios) for w, ratios, _ in aligner.calls] == [(2, [0.5, 0.4]), (ALL, [0.4])]
    assert winner(choice).windows == ALL


def test_the_winners_deviation_is_that_of_its_own_evaluation() -> None:
    def steps() -> Steps:
        yield generation(0.5, 0.4, 0.1)
        yield generation(0.3, probe=True)
        yield generation(0.6)
        return None

    aligner = Distance()
    choice = choose(aligner, strategy(steps), needs_deviation=True)
    assert choice.deviation["blocks.0.a"].tolist() == [pytest.approx(0.4)]
    assert len(aligner.calls) == 3  # nothing is measured twice


def test_a_probe_does_not_cost_the_winner_its_deviation() -> None:
    def steps() -> Steps:
        yield generation(0.3, probe=True)
        yield generation(0.6)
        return None

    aligner = Distance()
    choice = choose(aligner, strategy(steps), needs_deviation=True)
    assert choice.deviation["blocks.0.a"].tolist() == [pytest.approx(0.6)]
    assert len(aligner.calls) == 2


# -- several strategies ----------------------------------------------------------------------


def test_strategies_hear_only_their_own_costs_and_compete_at_the_end() -> None:
    heard: dict[str, list[list[float]]] = {"one": [], "two": []}

    def steps(name: str, *generations: Sequence[float]) -> Callable[[], Steps]:
        def run() -> Steps:
            for ratios in generations:
                costs = yield generation(*ratios)
                heard[name].append([round(m.misalignment, 6) for m in costs])
            return None

        return run

    aligner = Distance()
    choice = choose(
        aligner,
        strategy(steps("one", [0.5, 0.6], [0.45]), "One"),
        strategy(steps("two", [0.4], [0.41, 0.42], [0.35]), "Two"),
    )
    assert heard == {"one": [[0.2, 0.3], [0.15]], "two": [[0.1], [0.1, 0.1], [0.05]]}
    # They advance side by side, one walk for both; each is limited by its own best alone.
    assert aligner.measured == [[0.5, 0.6, 0.4], [0.45, 0.41, 0.42], [0.35]]
    limits = [limits for _, _, limits in aligner.calls]
    assert limits == [[None] * 3, [0.2, 0.1, 0.1], [0.1]]
    assert winner(choice).plugin == "two" and winner(choice).parameters == {"r": 0.35}
    assert [c.plugin for c in choice.candidates] == ["one"] * 3 + ["two"] * 4


def test_of_equal_winners_the_first_strategys_wins() -> None:
    def steps(*ratios: float) -> Callable[[], Steps]:
        def run() -> Steps:
            yield generation(*ratios)
            return None

        return run

    one, two = strategy(steps(0.5, 0.4), "One"), strategy(steps(0.2, 0.9), "Two")
    assert winner(choose(Distance(), one, two)).plugin == "one"
    assert winner(choose(Distance(), two, one)).plugin == "two"


def test_competing_winners_are_compared_on_all_windows() -> None:
    def few() -> Steps:
        yield generation(0.4, windows=2)  # 0.01 there, 0.1 on all
        return None

    def returned() -> Steps:
        yield from ()
        return proposal(0.35)

    def all_of_them() -> Steps:
        yield generation(0.36)
        return None

    aligner = Distance()
    choice = choose(
        aligner,
        strategy(few, "Few"),
        strategy(returned, "Returned"),
        strategy(all_of_them, "All"),
        needs_deviation=True,
    )
    assert winner(choice).plugin == "returned"
    # What is missing is measured, what is there is not; only the winner's deviation is needed.
    calls = [(w, ratios) for w, ratios, _ in aligner.calls]
    assert calls == [(2, [0.4]), (ALL, [0.36]), (ALL, [0.4]), (ALL, [0.35])]
    assert [c.misalignment for c in choice.candidates] == pytest.approx([0.1, 0.05, 0.06])


# -- wrong strategies ------------------------------------------------------------------------


def test_a_strategy_that_proposes_nothing_is_an_error() -> None:
    def steps() -> Steps:
        yield from ()
        return None

    message = r"block_ratios 'strategy' \(.*, hook propose_block_ratios: ended without a proposal"
    with pytest.raises(PluginError, match=message):
        choose(Distance(), strategy(steps))


@pytest.mark.parametrize(
    ("ratios", "parameters", "problem"),
    [
        ({"blocks.0.a": 0.5}, {}, r"differ in linear 'blocks\.1\.a'"),
        ({"blocks.0.a": 0.5, "blocks.1.a": 1.5}, {}, r"ratio of 'blocks\.1\.a' is not in \[0, 1\]"),
        ({"blocks.0.a": 0.5, "blocks.1.a": "x"}, {}, "proposed: "),
        ({"blocks.0.a": 0.5, "blocks.1.a": 0.5}, {"lam": torch.ones(1)}, "not JSON serializable"),
    ],
)
@pytest.mark.parametrize("returns", [False, True])
def test_a_wrong_proposal_is_blamed_on_its_strategy(
    ratios: Any, parameters: Any, problem: str, returns: bool
) -> None:
    def steps() -> Steps:
        if not returns:
            yield Generation([Proposal(ratios, parameters)])
        return Proposal(ratios, parameters)

    message = r"^block_ratios 'strategy' \([^)]*\), hook propose_block_ratios: .*" + problem
    with pytest.raises(PluginError, match=message):
        choose(Distance(), strategy(steps))


def test_an_error_in_a_later_step_is_blamed_on_its_strategy() -> None:
    closed = []

    def steps() -> Steps:
        try:
            yield generation(0.3)
            raise ZeroDivisionError("oh")
        finally:
            closed.append(True)

    with pytest.raises(PluginError, match=r"'strategy' .*ZeroDivisionError: oh"):
        choose(Distance(), strategy(steps))
    assert closed == [True]


# -- what strategies are given ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Curious:
    """Proposes what it draws, and shows what it was given."""

    bound: float = 1.0

    @hookimpl
    def propose_block_ratios(
        self,
        layout: Layout,
        sparsity: float,
        measurements: Sequence[Mapping[str, Tensor]],
        rng: torch.Generator,
    ) -> Any:
        yield from ()
        drawn = float(torch.rand((), generator=rng)) * self.bound
        return Proposal(
            dict.fromkeys(layout.linears, sparsity),
            {"drawn": drawn, "measured": [float(m["x"]) for m in measurements]},
        )


@dataclass(frozen=True, eq=False)
class Curiouser(Curious):
    """The same under another name."""


def drawn(kind: type = Curious, seed: int = 0) -> Any:
    plugin = load([("block_ratios", kind())])[0]
    choice = search(None, seed=seed).choose_blocks([plugin], {}, False)
    return winner(choice).parameters["drawn"]


def test_random_draws_depend_on_the_seed_and_the_name_alone() -> None:
    torch.manual_seed(1)
    first = drawn()
    torch.manual_seed(2)
    assert drawn() == first
    assert drawn(seed=1) != first
    assert drawn(Curiouser) != first


def test_every_strategy_is_given_its_own_measurements() -> None:
    one, two = (load([("block_ratios", kind())])[0] for kind in (Curious, Curiouser))
    measurements = {one: [{"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)}]}
    choice = search(Distance()).choose_blocks([one, two], measurements, False)
    assert [c.parameters["measured"] for c in choice.candidates] == [[1.0, 2.0], []]


# -- resuming --------------------------------------------------------------------------------


@dataclass
class Memory:
    """Keeps outcomes as a run's journal does."""

    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    def __call__(self, key: str, make: Callable[[], list[Outcome]]) -> list[Outcome]:
        if key not in self.outcomes:
            self.outcomes[key] = make()
        return self.outcomes[key]


def test_a_search_that_is_gone_over_again_measures_nothing_and_ends_alike() -> None:
    def steps() -> Steps:
        yield generation(0.5, 0.4)
        yield generation(0.35, windows=2)
        yield generation(0.9)
        return proposal(0.32)

    memory, aligner = Memory(), Distance()
    first = choose(aligner, strategy(steps), needs_deviation=True, journal=memory)
    assert len(memory.outcomes) == len(aligner.calls) == 4
    again = Distance()
    second = choose(again, strategy(steps), needs_deviation=True, journal=memory)
    assert again.calls == []
    assert second.candidates == first.candidates
    assert second.allocation.ratios == first.allocation.ratios
    assert second.deviation["blocks.0.a"].equal(first.deviation["blocks.0.a"])


def test_other_proposals_are_not_taken_from_the_journal() -> None:
    def steps(ratio: float, **more: Any) -> Callable[[], Steps]:
        def run() -> Steps:
            yield generation(ratio, 0.45, **more)
            yield generation(0.2)
            return None

        return run

    memory, aligner = Memory(), Distance()
    for made in (steps(0.5), steps(0.4), steps(0.4, probe=True)):
        choose(aligner, strategy(made), journal=memory)
    assert aligner.measured == [[0.5, 0.45], [0.2], [0.4, 0.45], [0.4, 0.45]]


# -- rows ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """Spreads the first block's ratio over its rows, and shows the deviation that it was given."""

    @hookimpl
    def required_statistics(self) -> set[str]:
        return {"input_norm"}

    @hookimpl
    def propose_row_ratios(
        self, layout: Layout, base: Mapping[str, float], deviation: Mapping[str, Tensor]
    ) -> Any:
        given = {name: d.tolist() for name, d in deviation.items()}

        def spread(lam: float) -> Proposal:
            line = torch.linspace(-lam, lam, 10, dtype=torch.float64)
            rows = {name: base[name] + line for name in layout.linears}
            return Proposal(rows, {"lam": lam, "given": given})

        yield Generation([spread(0.0), spread(0.1)])


@dataclass(frozen=True, eq=False)
class BlindRows(Rows):
    """The same, without naming `input_norm`."""

    @hookimpl
    def required_statistics(self) -> set[str]:
        return set()


@pytest.mark.parametrize(("kind", "given"), [(Rows, {"blocks.0.a": [0.5]}), (BlindRows, {})])
def test_rows_are_given_the_block_steps_ratios_and_the_deviation_that_they_name(
    kind: type, given: dict[str, list[float]]
) -> None:
    def steps() -> Steps:
        yield from ()
        return proposal(0.5)

    made = search(Distance())
    block = made.choose_blocks([strategy(steps)], {}, True)
    choice = made.choose_rows(load([("row_ratios", kind())])[0], block)
    assert [c.role for c in choice.candidates] == ["row_ratios"] * 2
    assert winner(choice).parameters == {"lam": 0.0, "given": given}
    assert choice.allocation.rows["blocks.0.a"].tolist() == [0.5] * 10


@dataclass(frozen=True, eq=False)
class Weighs:
    """Weighs the first row of the first block by what was measured, or breaks a rule."""

    how: str = "right"

    @hookimpl
    def measure_block(self) -> Mapping[str, Tensor]:
        return {}

    @hookimpl
    def describe(self) -> RowRatiosTraits:
        return RowRatiosTraits(weighs_rows=True)

    @hookimpl
    def propose_row_ratios(
        self, base: Mapping[str, float], measurements: Sequence[Mapping[str, Tensor]]
    ) -> Any:
        def proposal(c: float, name: str = "blocks.0.a") -> Proposal:
            rows = torch.ones(10, dtype=torch.float64)
            rows[0] = c
            return Proposal(base, {}, importance={name: Importance(rows)})

        match self.how:
            case "ratios of rows":
                rows = {n: torch.full((10,), r) for n, r in base.items()}
                yield Generation([Proposal(rows)])
            case "zero":
                yield Generation([proposal(0.0)])
            case "unknown":
                yield Generation([proposal(1.0, "lm_head")])
            case "none":
                yield Generation([Proposal(base, importance=None)])  # type: ignore[arg-type]
            case "a tensor":
                bare: Any = {n: torch.ones(10) for n in base}
                yield Generation([Proposal(base, importance=bare)])
            case "a list":
                listed: Any = [1.0] * 10
                importance = {n: Importance(listed) for n in base}
                yield Generation([Proposal(base, importance=importance)])
            case "a parameter":
                weighed = Importance(torch.arange(1.0, 11.0, requires_grad=True))
                yield Generation([Proposal(base, importance={"blocks.0.a": weighed})])
            case "of inputs":
                some = (torch.ones(10), torch.arange(1.0, 11.0))
                both = [{"blocks.0.a": Importance(torch.ones(10), x)} for x in some]
                yield Generation([Proposal(base, importance=x) for x in both])
                return
        yield Generation([proposal(float(c)) for c in measurements[0]["c"]])


@dataclass
class Weight(Distance):
    """How far the first row's importance is from 3 times the second's; less if inputs have it."""

    def measure(self, trials: Any, inputs: Any, tick: Any = int, mark: Any = None) -> Any:
        made = []
        for trial in trials:
            target = trial.targets["blocks.0.a"]
            assert target.comparison == "matrix"
            weighed = target.importance
            times = 1.0 if weighed is None else float(weighed.rows[0] / weighed.rows[1])
            self.calls.append((inputs, [times], []))
            of_inputs = weighed is not None and weighed.inputs is not None
            cost = abs(times - 3) - of_inputs / 2
            made.append(Outcome(Measurement(cost, False, 1), {}))
        return made


def weigh(
    aligner: Any, how: str = "right", journal: Any = None, *c: float, inputs: bool = True
) -> Decision:
    def steps() -> Steps:
        yield from ()
        return proposal(0.5)

    block = search(Distance()).choose_blocks([strategy(steps)], {}, False)
    measured = [{"c": torch.tensor(c or (1.0, 2.5, 4.0))}]
    plugin = load([("row_ratios", Weighs(how))])[0]
    made = replace(search(aligner, journal), weighs_inputs=inputs)
    return made.choose_rows(plugin, block, measured)


def test_proposals_that_differ_only_in_importance_compete() -> None:
    choice = weigh(Weight())
    assert [c.misalignment for c in choice.candidates] == [2.0, 0.5, 1.0]
    assert [c.selected for c in choice.candidates] == [False, True, False]
    chosen = choice.allocation.importance
    assert {n: x.rows.tolist() for n, x in chosen.items()} == {"blocks.0.a": [2.5] + 9 * [1.0]}
    assert choice.allocation.rows == {}


def test_inputs_compete_by_their_importance_where_the_pruner_only_scores() -> None:
    """The two differ in nothing else, not in their parameters either: both are measured."""
    choice = weigh(Weight(), "of inputs")
    assert [c.misalignment for c in choice.candidates] == [2.0, 1.5]
    inputs = choice.allocation.importance["blocks.0.a"].inputs
    assert inputs is not None and inputs.tolist() == [*range(1, 11)]
    message = "hook propose_row_ratios: proposed: importance of inputs under a pruner that moves"
    with pytest.raises(PluginError, match=message):
        weigh(Weight(), "of inputs", inputs=False)


def test_other_importance_is_not_taken_from_the_journal() -> None:
    memory, aligner = Memory(), Weight()
    for c in ((1.0,), (1.0,), (2.0,)):
        weigh(aligner, "right", memory, *c)
    assert aligner.measured == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("ratios of rows", "ratios of rows, though describe says weighs_rows=True"),
        ("zero", "importance of 'blocks.0.a' is not positive and finite"),
        ("unknown", "allocation and model differ in linear 'lm_head'"),
        ("none", "importance is NoneType, not a mapping"),
        ("a tensor", r"importance of 'blocks.0.a' is Tensor, not Importance\(rows, inputs\)"),
        ("a list", "importance of 'blocks.0.a' is list, not a floating tensor"),
    ],
)
def test_a_wrong_importance_is_blamed_on_its_hook(how: str, problem: str) -> None:
    message = f"'weighs' .*hook propose_row_ratios: proposed: {problem}"
    with pytest.raises(PluginError, match=message):
        weigh(Weight(), how)


def test_importance_may_come_from_a_parameter() -> None:
    first = weigh(Weight(), "a parameter").candidates[0]
    assert first.misalignment == 2.5  # 1 to 2


def test_importance_is_for_plugins_that_say_so() -> None:
    def steps() -> Steps:
        weighed = {"blocks.0.a": Importance(torch.ones(10))}
        yield Generation([proposal(0.5, importance=weighed)])
        return None

    message = "hook propose_block_ratios: proposed: importance is for role row_ratios, where"
    with pytest.raises(PluginError, match=message):
        choose(Distance(), strategy(steps))


# -- with a model ----------------------------------------------------------------------------


@pytest.fixture
def real() -> TopUpSearch:
    model = tiny_model("llama")
    walk = Walker(model, find(model))
    pruner, metric = load([("pruner", "wanda"), ("alignment", "neuron")])
    aligner = Aligner(walk, BasePruner(pruner, None, 0), metric, deviation=True)
    ids = windows(4)
    return TopUpSearch(
        aligner=aligner,
        layout=walk.layout,
        rules=Rules(0.6),
        inputs=lambda n: walk.inputs(ids[:n]),
        windows=4,
        journal=lambda key, make: make(),
        progress=lambda title, total: int,
        seed=0,
    )


def test_neuroal_both_steps(real: TopUpSearch) -> None:
    blocks, rows = load([("block_ratios", "linear_schedule"), ("row_ratios", "neuroal")])
    block = real.choose_blocks([blocks], {}, True)
    row = real.choose_rows(rows, block)
    aligner = real.aligner
    assert aligner is not None
    plugins = aligner.metric, aligner.pruner.pruner
    works = (generation_work(*plugins, True, blocks=3, candidates=n, windows=4) for n in (14, 15))
    runs = sum(work.block_runs for work in works)
    # Fewer where two candidates happen to prune the first blocks alike.
    assert aligner.walker.block_runs <= runs
    for choice, count in ((block, 14), (row, 15)):
        costs = [c.misalignment for c in choice.candidates if c.misalignment is not None]
        assert len(costs) == count
        assert winner(choice).misalignment == min(costs)
        assert choice.candidates[costs.index(min(costs))].selected
    assert row.candidates[0].parameters == {"lam": 0.0}
    # Without a spread the rows are the block step's winner over again.
    assert row.candidates[0].misalignment == winner(block).misalignment
    assert row.allocation.ratios == pytest.approx(dict(block.allocation.ratios), abs=0.02)


def test_a_search_is_repeatable(real: TopUpSearch) -> None:
    (blocks,) = load([("block_ratios", "linear_schedule")])
    first, second = (real.choose_blocks([blocks], {}, True) for _ in range(2))
    assert first.candidates == second.candidates
    assert all(second.deviation[n].equal(d) for n, d in first.deviation.items())


# -- linears that stay dense -----------------------------------------------------------------


def test_a_block_strategy_sees_what_is_pruned_and_a_row_strategy_all() -> None:
    seen: list[Any] = []

    @dataclass(frozen=True, eq=False)
    class Blocks:
        @hookimpl
        def propose_block_ratios(self, layout: Layout, sparsity: float) -> Steps:
            seen.append((layout, sparsity))
            yield from ()
            return Proposal(dict.fromkeys(layout.linears, sparsity))

    @dataclass(frozen=True, eq=False)
    class Rows:
        @hookimpl
        def propose_row_ratios(self, layout: Layout, base: Mapping[str, float]) -> Steps:
            seen.append((layout, dict(base)))
            yield from ()
            half = torch.full((10,), 0.5, dtype=torch.float64)
            return Proposal(dict.fromkeys(layout.linears, half))

    dense = {"blocks.0.a": "--keep"}
    rules = Rules(0.3, dense=dense, over="all")
    made = replace(search(Distance()), rules=rules)
    blocks, rows = load([("block_ratios", Blocks()), ("row_ratios", Rows())])
    choice = made.choose_blocks([blocks], {}, needs_deviation=False)
    assert choice.allocation.ratios == {"blocks.0.a": 0.0, "blocks.1.a": 0.6}
    found, sparsity = seen.pop()
    assert sparsity == 0.6 and list(found.linears) == ["blocks.1.a"]
    assert [b.index for b in found.blocks] == [0] and found.linears["blocks.1.a"].block == 0
    choice = made.choose_rows(rows, choice)
    assert seen == [(FOUND, {"blocks.0.a": 0.0, "blocks.1.a": 0.6})]
    assert choice.allocation.ratios == {"blocks.0.a": 0.0, "blocks.1.a": 0.5}
    assert not choice.allocation.rows["blocks.0.a"].any()
    wanted = targets(choice.allocation, FOUND, rules)
    assert wanted.keys() == {"blocks.1.a"} and int(wanted["blocks.1.a"].counts.sum()) == 60
