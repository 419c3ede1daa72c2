"""Which plugins of a recipe fit together: what is refused, what a preset leaves out and says so."""

import dataclasses
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuroal import (
    BlockRatiosTraits,
    Generation,
    Layout,
    Measurement,
    NeuroalError,
    Pattern,
    PluginError,
    Proposal,
    PrunedLinear,
    PrunerTraits,
    Recipe,
    RowRatiosTraits,
    UsageError,
    hookimpl,
)
from neuroal.cost.preparation import Prepared, SearchStep, first_steps
from neuroal.plugins import Listing, loading
from neuroal.run.setup import Setup, setup
from neuroal.testing import layout

FOUND = layout(3, {"a": (4, 8), "b": (8, 4)})


@dataclass(frozen=True, eq=False)
class Mover:
    """A pruner like SparseGPT: no scores, no ratios per row."""

    patterns: bool = True

    @hookimpl
    def describe(self) -> PrunerTraits:
        return PrunerTraits("matrix", False, self.patterns)

    @hookimpl
    def prune_linear(self, weight: Tensor) -> PrunedLinear:
        return PrunedLinear(weight, torch.zeros_like(weight, dtype=torch.bool))


@dataclass(frozen=True, eq=False)
class Scorer:
    """The smallest pruner."""

    @hookimpl
    def score_weights(self, weight: Tensor) -> Tensor:
        return weight.abs()


@dataclass(frozen=True, eq=False)
class Refine:
    @hookimpl
    def refine_mask(self, mask: Tensor) -> Tensor:
        return mask


@dataclass(frozen=True, eq=False)
class Measures:
    """Block ratios that want the dense walk."""

    @hookimpl
    def measure_block(self) -> Mapping[str, Tensor]:
        return {}

    @hookimpl
    def propose_block_ratios(self) -> Any:
        yield from ()


def names(made: Setup) -> list[tuple[str, str]]:
    return [(p.role, p.name) for p in made.plugins]


def steps(made: Setup) -> list[str]:
    """Block and row step, by name."""
    rows = [made.row_ratios.name] if made.row_ratios else []
    return [p.name for p in made.block_ratios] + rows


# -- what a recipe stands for ----------------------------------------------------------------


def test_the_default_is_neuroal_on_wanda() -> None:
    made = setup(Recipe())
    assert names(made) == [
        ("pruner", "wanda"),
        ("block_ratios", "linear_schedule"),
        ("row_ratios", "neuroal"),
        ("alignment", "neuron"),
    ]
    assert (made.comparison, made.pattern, made.refiner, made.notes) == ("row", None, None, ())
    assert made.reads_deviation and made.measures == ()


@pytest.mark.parametrize(
    ("top_up", "expected"),
    [
        ("uniform", ["uniform", "uniform"]),
        ("neuroal", ["linear_schedule", "neuroal"]),
        ("neuroal-block", ["linear_schedule", "uniform"]),
        ("neuroal-row", ["uniform", "neuroal"]),
    ],
)
def test_presets(top_up: str, expected: list[str]) -> None:
    made = setup(Recipe(top_up=top_up))
    assert steps(made) == expected and made.notes == ()
    assert made.reads_deviation == (expected[1] == "neuroal")


def test_a_role_that_is_named_replaces_that_part_of_the_preset() -> None:
    made = setup(Recipe(block_ratios=("uniform", "linear_schedule"), alignment="cosine"))
    assert steps(made) == ["uniform", "linear_schedule", "neuroal"]
    assert made.alignment.name == "cosine"
    assert steps(setup(Recipe(row_ratios="uniform"))) == ["linear_schedule", "uniform"]


def test_plugins_are_the_pruner_then_the_roles_in_order() -> None:
    made = setup(Recipe(pruner=Scorer(), block_ratios=(Measures(),), refiner=Refine()))
    assert [role for role, _ in names(made)] == [
        "pruner",
        "block_ratios",
        "row_ratios",
        "alignment",
        "refiner",
    ]
    assert [p.name for p in made.measures] == ["measures"]


def test_an_unknown_preset_or_plugin_is_refused() -> None:
    with pytest.raises(UsageError, match=r"neuroals"):
        setup(Recipe(top_up="neuroals"))
    with pytest.raises(UsageError, match=r"wnada.*did you mean 'wanda'"):
        setup(Recipe(pruner="wnada"))


# -- rows ------------------------------------------------------------------------------------

NO_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"pruner": Mover()}, "the mask of pruner 'mover' is not per row"),
    ({"pattern": "2:4", "sparsity": 0.6}, "pattern 2:4 fixes the ratio of every row"),
    ({"comparison": "matrix"}, "weights compete over the whole matrix"),
    (
        {"pruner": "magnitude", "options": {"magnitude": {"comparison": "matrix"}}},
        "weights compete over the whole matrix",
    ),
]
without_rows = pytest.mark.parametrize(("choice", "why"), NO_ROWS)


@without_rows
def test_a_preset_leaves_its_row_step_out_and_says_so(choice: dict[str, Any], why: str) -> None:
    made = setup(Recipe(**choice))
    assert steps(made) == ["linear_schedule", "uniform"]
    (note,) = made.notes
    assert note.startswith("row step of top-up 'neuroal' left out: ") and why in note
    assert not made.reads_deviation


@without_rows
def test_rows_that_were_asked_for_are_refused(choice: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=rf"row ratios make no sense here: {why}"):
        setup(Recipe(**choice, row_ratios="neuroal"))


@without_rows
def test_a_row_step_alone_is_refused(choice: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=rf"top-up 'neuroal-row' is a row step alone, and {why}"):
        setup(Recipe(**choice, top_up="neuroal-row"))


@without_rows
@pytest.mark.parametrize("top_up", ["uniform", "neuroal-block"])
def test_what_has_no_row_step_needs_no_note(choice: dict[str, Any], why: str, top_up: str) -> None:
    assert setup(Recipe(**choice, top_up=top_up)).notes == ()
    assert setup(Recipe(**choice, top_up=top_up, row_ratios="uniform")).notes == ()


def test_a_pruner_for_matrices_can_be_told_to_compare_rows() -> None:
    made = setup(
        Recipe(
            pruner="magnitude",
            options={"magnitude": {"comparison": "matrix"}},
            comparison="row",
        )
    )
    assert made.comparison == "row" and made.notes == ()
    assert steps(made) == ["linear_schedule", "neuroal"]


@dataclass(frozen=True, eq=False)
class Weighs:
    """A row step that weighs rows, with one candidate more where it may weigh inputs."""

    @hookimpl
    def describe(self) -> RowRatiosTraits:
        return RowRatiosTraits(weighs_rows=True)

    @hookimpl
    def propose_row_ratios(self, base: Mapping[str, float], weighs_inputs: bool) -> Any:
        yield Generation([Proposal(dict(base), {"n": n}) for n in range(3 + weighs_inputs)])


@pytest.mark.parametrize(
    ("choice", "candidates"),
    [
        ({}, 4),
        ({"comparison": "matrix"}, 4),
        ({"pruner": Mover()}, 3),
        *(({"pruner": name}, 4) for name in ("magnitude", "ria", "multiflow")),
        *(({"pruner": name}, 3) for name in ("sparsegpt", "admm", "alps")),
    ],
)
def test_importance_of_rows_goes_with_every_pruner(choice: dict[str, Any], candidates: int) -> None:
    """That of inputs with every one that only scores."""
    recipe = Recipe(**choice, block_ratios="uniform", row_ratios=Weighs())
    made = setup(recipe)
    assert steps(made) == ["uniform", "weighs"] and made.notes == ()
    step = SearchStep("row_ratios", "weighs", candidates, widest=candidates * 8)
    assert first_steps(made, FOUND, recipe)[1] == step


NO_IMPORTANCE: list[tuple[dict[str, Any], str]] = [
    ({"pattern": "2:4"}, "pattern 2:4 fixes the ratio of every row"),
    ({"comparison": "row"}, "rows compete by their importance, and --comparison row keeps them"),
]


@pytest.mark.parametrize(("choice", "why"), NO_IMPORTANCE)
def test_importance_that_cannot_be_is_refused_or_left_out(choice: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=f"row ratios make no sense here: {why}"):
        setup(Recipe(**choice, row_ratios="row_sensitivity"))
    made = setup(Recipe(**choice, top_up="best-slow", sparsity=0.5))
    assert steps(made)[1] == "uniform"
    assert any(n.startswith("row step of top-up 'best-slow' left out: ") for n in made.notes)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "ria", "sparsegpt", "admm", "alps"])
def test_the_slow_preset_has_its_row_step_under_every_pruner(pruner: str) -> None:
    made = setup(Recipe(pruner=pruner, top_up="best-slow"))
    assert steps(made) == ["sensitivity", "row_sensitivity"] and made.notes == ()
    assert [p.name for p in made.measures] == ["row_sensitivity"]


def test_a_row_step_says_what_it_is() -> None:
    @dataclass(frozen=True, eq=False)
    class Unsure(Weighs):
        @hookimpl
        def describe(self) -> Any:
            return True

    with pytest.raises(PluginError, match=r"hook describe: returned bool, not RowRatiosTraits"):
        setup(Recipe(row_ratios=Unsure()))


# -- patterns --------------------------------------------------------------------------------


def test_a_pattern_alone_fixes_every_ratio() -> None:
    made = setup(Recipe(pattern="2:4"))
    assert made.pattern == Pattern(2, 4)
    assert steps(made) == ["uniform", "uniform"]
    assert [n.partition(" of ")[0] for n in made.notes] == ["row step", "block step"]
    assert "pattern 2:4 alone fixes every ratio" in made.notes[1]
    assert "--sparsity" in made.notes[1]


def test_a_sparsity_beside_a_pattern_lets_it_vary() -> None:
    recipe = Recipe(pattern="2:4", sparsity=0.6)
    made = setup(recipe)
    assert steps(made) == ["linear_schedule", "uniform"]
    rules = made.rules(recipe, FOUND)
    assert rules.varies and rules.sparsity == 0.6 and rules.pattern == Pattern(2, 4)


@pytest.mark.parametrize(("sparsity", "wanted"), [(None, 0.25), (0.25, 0.25)])
def test_a_patterns_own_sparsity_does_not(sparsity: float | None, wanted: float) -> None:
    recipe = Recipe(pattern="3:4", sparsity=sparsity)
    rules = setup(recipe).rules(recipe, FOUND)
    assert not rules.varies and rules.sparsity == wanted


def test_block_ratios_that_were_asked_for_are_refused_under_a_fixed_pattern() -> None:
    with pytest.raises(UsageError, match="block ratios make no sense here: pattern 2:4 alone"):
        setup(Recipe(pattern="2:4", block_ratios=("linear_schedule",)))
    made = setup(Recipe(pattern="2:4", block_ratios=("uniform",), row_ratios="uniform"))
    assert steps(made) == ["uniform", "uniform"] and made.notes == ()


def test_a_pattern_may_keep_one_of_any_m() -> None:
    for of in range(2, 65):  # 1 - 1/3 is not what 2/3 is
        assert setup(Recipe(pattern=f"1:{of}", top_up="uniform")).pattern == Pattern(1, of)


@pytest.mark.parametrize("comparison", ["row", "matrix"])
def test_a_comparison_makes_no_sense_under_a_pattern(comparison: Any) -> None:
    match = f"--comparison {comparison} makes no sense here: weights compete within the groups of"
    with pytest.raises(UsageError, match=match):
        setup(Recipe(pattern="2:4", comparison=comparison))


def test_a_pruner_without_patterns() -> None:
    with pytest.raises(UsageError, match="pruner 'mover' has no N:M patterns"):
        setup(Recipe(pruner=Mover(patterns=False), pattern="2:4"))


def test_m_must_divide_the_inputs() -> None:
    recipe = Recipe(pattern="4:8")
    with pytest.raises(NeuroalError, match=r"4:8 does not divide the 4 inputs of 'blocks\.0\.b'"):
        setup(recipe).rules(recipe, FOUND)
    recipe = Recipe(pattern="4:8", skip_indivisible=True)
    rules = setup(recipe).rules(recipe, FOUND)
    assert rules.dense.keys() == {"blocks.0.b", "blocks.1.b", "blocks.2.b"}
    (line,) = rules.left_dense(FOUND)
    assert line.startswith("pattern 4:8 does not divide the inputs: blocks.0.b and 2 more, ")
    assert setup(Recipe()).rules(Recipe(), FOUND).left_dense(FOUND) == []
    recipe = Recipe(pattern="4:16", skip_indivisible=True)
    with pytest.raises(NeuroalError, match="pattern 4:16 divides the inputs of no linear"):
        setup(recipe).rules(recipe, FOUND)


def test_rules_of_an_unstructured_recipe() -> None:
    recipe = Recipe(sparsity=0.7, budget="paper", comparison="matrix", top_up="uniform")
    rules = setup(recipe).rules(recipe, FOUND)
    assert (rules.sparsity, rules.budget, rules.comparison) == (0.7, "paper", "matrix")
    assert (rules.pattern, rules.varies, rules.dense) == (None, False, {})


# -- an earlier allocation -------------------------------------------------------------------


def test_an_allocation_takes_the_place_of_the_search() -> None:
    made = setup(Recipe(allocation="earlier"))
    assert steps(made) == [] and made.notes == ()
    assert not made.reads_deviation
    assert first_steps(made, FOUND, Recipe(allocation="earlier")) == []


@pytest.mark.parametrize("choice", [{"block_ratios": ("uniform",)}, {"row_ratios": "uniform"}])
def test_an_allocation_and_ratios_exclude_each_other(choice: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--allocation holds every ratio"):
        setup(Recipe(allocation="earlier", **choice))


# -- refiners --------------------------------------------------------------------------------


def test_a_refiner_needs_scores() -> None:
    with pytest.raises(UsageError, match="'refine' needs scores, which pruner 'mover' has not"):
        setup(Recipe(pruner=Mover(), refiner=Refine()))
    made = setup(Recipe(pruner=Scorer(), refiner=Refine()))
    assert made.refiner is not None and made.refiner.name == "refine"


@pytest.fixture
def preset(tmp_path: Path) -> str:
    """A preset of a stranger's, with a refiner and options."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from neuroal import TopUp, hookimpl\n"
        "\n"
        "@dataclass(frozen=True, eq=False)\n"
        "class Refine:\n"
        "    strength: float = 1.0\n"
        "\n"
        "    @hookimpl\n"
        "    def refine_mask(self, mask):\n"
        "        return mask\n"
        "\n"
        f"MINE = TopUp(('linear_schedule',), 'neuroal', 'cosine', {str(file)!r} + ':Refine',\n"
        "             {'refine': {'strength': 2.0}, 'linear_schedule': {'lambdas': (0.1,)}})\n"
    )
    return f"{file}:MINE"


def test_a_presets_refiner_and_options(preset: str) -> None:
    made = setup(Recipe(top_up=preset))
    assert made.refiner is not None and made.refiner.instance.strength == 2.0
    assert made.alignment.name == "cosine"
    assert made.block_ratios[0].instance.lambdas == (0.1,)


def test_a_recipes_options_override_the_presets(preset: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "refine": {"strength": "3"},
        "neuroal": {"lambdas": [0.0]},
    }
    made = setup(Recipe(top_up=preset, options=options))
    assert made.refiner is not None and made.refiner.instance.strength == 3.0
    assert made.block_ratios[0].instance.lambdas == (0.1,)
    assert made.row_ratios is not None and made.row_ratios.instance.lambdas == (0.0,)


def test_none_removes_a_presets_refiner(preset: str) -> None:
    made = setup(Recipe(top_up=preset, refiner="none"))
    assert made.refiner is None  # and its options with it


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_every_plugin_is_loaded_once(pruner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[str] = []
    plain = loading._bound

    def count(listing: Listing, *rest: Any) -> Any:
        bound.append(f"{listing.role} {listing.name}")
        return plain(listing, *rest)

    monkeypatch.setattr(loading, "_bound", count)
    setup(Recipe(pruner=pruner, refiner="dsnot" if pruner == "wanda" else None))
    assert len(bound) == len(set(bound))


def test_options_for_a_step_that_is_left_out_are_refused() -> None:
    options = {"neuroal": {"lambdas": [0.1]}}
    with pytest.raises(UsageError, match="options for 'neuroal', which is not used: this run uses"):
        setup(Recipe(pruner=Mover(), options=options))


def test_options_for_a_plugin_that_is_not_used_are_refused() -> None:
    with pytest.raises(UsageError, match="options for 'cosine', which is not used"):
        setup(Recipe(options={"cosine": {"x": 1}}))
    with pytest.raises(UsageError, match="plugin 'neuroal' has no option 'lamdas'"):
        setup(Recipe(options={"neuroal": {"lamdas": [0.1]}}))


# -- broken plugins --------------------------------------------------------------------------


def test_a_description_that_is_none() -> None:
    @dataclass(frozen=True, eq=False)
    class Vague(Scorer):
        @hookimpl
        def describe(self) -> Any:
            return {"comparison": "row"}

    with pytest.raises(PluginError, match=r"'vague' .*describe: returned dict, not PrunerTraits"):
        setup(Recipe(pruner=Vague()))


def test_a_pruner_that_does_not_describe_itself_can_do_everything() -> None:
    made = setup(Recipe(pruner=Scorer(), refiner=Refine()))
    assert made.comparison == "row" and made.notes == ()


def test_an_unknown_statistic_is_blamed_on_its_plugin() -> None:
    @dataclass(frozen=True, eq=False)
    class Wants(Scorer):
        @hookimpl
        def required_statistics(self) -> set[str]:
            return {"input_nrom"}

    message = r"pruner 'wants' .*required_statistics: unknown statistic 'input_nrom': did you mean"
    with pytest.raises(PluginError, match=message):
        setup(Recipe(pruner=Wants()))


# -- first steps -----------------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "count"), [(0.7, 14), (0.8, 13)])
def test_first_steps_of_neuroal(sparsity: float, count: int) -> None:
    recipe = Recipe(sparsity=sparsity)
    assert first_steps(setup(recipe), FOUND, recipe) == [
        SearchStep("block_ratios", "linear_schedule", count, widest=count * 8),
        SearchStep("row_ratios", "neuroal", 15, widest=15 * 8),
    ]


def test_first_steps_of_a_tenth_of_neuroal() -> None:
    """Three candidates each, on 2 and on 3 of 4 windows, and no answer to what they cost."""
    recipe = Recipe(sparsity=0.7, top_up="neuroal-fast")
    assert setup(recipe).search_samples == 4
    assert first_steps(setup(recipe), FOUND, recipe) == [
        SearchStep("block_ratios", "lambda_parabola", 3, widest=3 * 2),
        SearchStep("row_ratios", "neuroal_parabola", 3, widest=3 * 3),
    ]


@pytest.mark.parametrize(
    ("name", "most"), [("lambda_search", 14), ("evolution", None), ("sensitivity", 29)]
)
def test_strategies_that_answer_costs_go_on(name: str, most: float | None) -> None:
    recipe = Recipe(block_ratios=(name,), row_ratios="row_sensitivity")
    steps = first_steps(setup(recipe), FOUND, recipe)
    assert (steps[0].goes_on, steps[0].most) == (True, most)
    assert steps[0].open_ended == (most is None)
    assert steps[1] == SearchStep("row_ratios", "row_sensitivity", None, most=48)


@pytest.mark.parametrize("most", [0, -1.0, math.inf, math.nan, "29"])
def test_costs_that_are_no_number_are_refused(most: Any) -> None:
    @dataclass(frozen=True, eq=False)
    class Says:
        @hookimpl
        def describe(self) -> BlockRatiosTraits:
            return BlockRatiosTraits(candidates=most)

        @hookimpl
        def propose_block_ratios(self, layout: Layout, sparsity: float) -> Any:
            for _ in range(2):
                yield Generation([Proposal(dict.fromkeys(layout.linears, sparsity))])

    recipe = Recipe(block_ratios=Says(), row_ratios="uniform")
    with pytest.raises(PluginError, match=r"describe: returned candidates=.*: give a number above"):
        first_steps(setup(recipe), FOUND, recipe)


def test_the_widest_generation_by_hand() -> None:
    """1 · 8, 2 · 4, 3 · 2, then 4 on all 8 windows; its answer the plugin divides by its spread."""

    @dataclass(frozen=True, eq=False)
    class Widens:
        @hookimpl
        def propose_block_ratios(
            self, layout: Layout, sparsity: float
        ) -> Generator[Generation, list[Measurement], None]:
            flat = dict.fromkeys(layout.linears, sparsity)
            costs = [1.0]
            for count, windows in ((1, None), (2, 4), (3, 2), (4, 100)):
                made = [Proposal(flat, {"n": n}) for n in range(count)]
                costs = [m.misalignment for m in (yield Generation(made, windows=windows))]
            _ = 1 / (max(costs) - min(costs))

    recipe = Recipe(block_ratios=Widens(), row_ratios="uniform")
    step = first_steps(setup(recipe), FOUND, recipe)[0]
    assert step == SearchStep("block_ratios", "widens", 1, goes_on=True, widest=4 * 8)
    few = dataclasses.replace(recipe, samples=3)
    assert first_steps(setup(few), FOUND, few)[0].widest == 4 * 3


def test_first_steps_that_measure_nothing_or_cannot_be_known() -> None:
    recipe = Recipe(block_ratios=("uniform", Measures()), row_ratios="uniform")
    assert first_steps(setup(recipe), FOUND, recipe) == [
        SearchStep("block_ratios", "uniform", 0),
        SearchStep("block_ratios", "measures", None),
        SearchStep("row_ratios", "uniform", 0),
    ]


@pytest.mark.parametrize(
    ("choice", "reads"),
    [
        ({"pruner": "magnitude", "top_up": "uniform"}, False),
        ({"pruner": "wanda", "top_up": "uniform"}, True),
        ({"pruner": "magnitude", "top_up": "neuroal-block"}, True),
        ({"pruner": "magnitude", "top_up": "neuroal-row"}, True),
        ({"pruner": "magnitude", "top_up": "uniform", "block_ratios": (Measures(),)}, True),
        ({"pruner": "magnitude", "allocation": "earlier"}, False),
        ({"pruner": "wanda", "allocation": "earlier"}, True),
    ],
)
def test_whether_a_run_reads_data(choice: dict[str, Any], reads: bool) -> None:
    recipe = Recipe(**choice)
    made = setup(recipe)
    prepared = Prepared(recipe, made, None, FOUND, made.rules(recipe, FOUND), None, made.notes)
    assert prepared.reads_data == reads


def test_a_strategy_that_fails_at_once_is_blamed_before_any_weight_is_read() -> None:
    @dataclass(frozen=True, eq=False)
    class Fails:
        @hookimpl
        def propose_block_ratios(self, layout: Layout) -> Any:
            raise RuntimeError(f"{len(layout.blocks)} blocks")
            yield

    recipe = Recipe(block_ratios=(Fails(),))
    made = setup(recipe)
    message = r"'fails' .*propose_block_ratios: RuntimeError: 3 blocks"
    with pytest.raises(PluginError, match=message):
        first_steps(made, FOUND, recipe)
