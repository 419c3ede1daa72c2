"""From a study to its cases: all combinations, one id for what is one computation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from neuroal.errors import NeuroalError, UsageError
from neuroal.recipe import GivenRatio
from neuroal.study.run import PreparedStudy

Change = Callable[..., PreparedStudy]
MINE = """
from dataclasses import dataclass
from neuroal import hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    @hookimpl
    def score_weights(self, weight):
        return weight.abs()
"""


def ids(prepared: PreparedStudy) -> list[str]:
    return [case.id for case in prepared.expansion.cases]


def test_the_product_of_all_lists(prepared: Change) -> None:
    cases = prepared().expansion.cases
    assert len(cases) == 2 * (1 + 2 * 2 * 2) == len({case.id for case in cases})
    assert [case.title for case in cases[:4]] == [
        "llama, dense",
        "llama, magnitude + uniform at 0.5, seed 0",
        "llama, magnitude + uniform at 0.7, seed 0",
        "llama, magnitude + owl at 0.5, seed 0",
    ]
    assert cases[9].title == "opt, dense"
    recipe = cases[-1].recipe
    assert recipe is not None
    assert (recipe.pruner, recipe.top_up, recipe.sparsity) == ("wanda", "owl", 0.7)
    assert (recipe.samples, recipe.search_samples, recipe.dtype) == (4, 2, "float32")


def test_an_id_is_decided_by_all_that_decides_the_weights(prepared: Change, desk: Path) -> None:
    first = ids(prepared())
    assert ids(prepared()) == first
    changes: tuple[tuple[str, str], ...] = (
        ("samples = 4", "samples = 3"),
        ("sparsities = [0.5, 0.7]", "seeds = [1]\nsparsities = [0.5, 0.7]"),
        ('"wanda"', '{name = "wanda", label = "w", options = {}}'),
        ('"owl"]', '{name = "owl", options = {owl = {M = 3}}}]'),
        ("samples = 3", 'samples = 3\nbos = "always"'),
        ("samples = 3", "samples = 3\npack_documents = false"),
        ("sparsities = [0.5, 0.7]", 'keep = ["first:1"]\nsparsities = [0.5, 0.7]'),
    )
    for number, change in enumerate(changes):
        now = ids(prepared(change))
        same = [a == b for a, b in zip(first, now, strict=True)]
        assert same[0] and same[9]  # the dense models have no part in it
        pruned = [s for i, s in enumerate(same) if i not in (0, 9)]
        if number == 2:  # a name decides nothing
            assert all(pruned)
        elif number == 3:  # owl's alone
            assert pruned == [True, True, False, False] * 4
        else:
            assert not any(pruned)
        first = now
    rows = [json.dumps({"input_ids": [5] * 16})] * 8
    (desk / "rows.jsonl").write_text("\n".join(rows))
    assert not set(first[1:9]) & set(ids(prepared()))
    assert ids(prepared())[0] == first[0]


def test_an_id_follows_the_model_and_not_its_place(prepared: Change, desk: Path) -> None:
    first = ids(prepared())
    shutil.move(desk / "opt", desk / "moved")
    assert ids(prepared(('"opt"', '{name = "moved", label = "opt"}'))) == first
    config = json.loads((desk / "moved/config.json").read_text())
    (desk / "moved/config.json").write_text(json.dumps(config | {"bos_token_id": 3}))
    now = ids(prepared())
    assert now[:9] == first[:9] and not set(now[9:]) & set(first)


def test_an_id_follows_the_source_of_a_plugin(prepared: Change, desk: Path) -> None:
    (desk / "mine.py").write_text(MINE)
    first = ids(prepared(('"wanda"', '"mine.py:Mine"')))
    (desk / "mine.py").write_text(MINE + "\n# another\n")
    now = ids(prepared())
    assert [a == b for a, b in zip(first[1:9], now[1:9], strict=True)] == [True] * 4 + [False] * 4


def test_one_computation_by_two_names_is_one_case(prepared: Change) -> None:
    """Without its row step, which SparseGPT cannot have, NeuroAL is its block step."""
    change = ('["uniform", "owl"]', '["neuroal", "neuroal-block"]')
    expansion = prepared(change, ('"wanda"', '"sparsegpt"')).expansion
    assert len(expansion.cases) == 18
    assert len(expansion.distinct) == 18 - 2 * 2
    titles = [case.title for case in expansion.distinct]
    assert "opt, sparsegpt + neuroal at 0.5, seed 0" in titles
    assert "opt, sparsegpt + neuroal-block at 0.5, seed 0" not in titles


def test_linears_are_kept_in_all_cases(prepared: Change) -> None:
    more = 'keep = ["first:1"]\nonly = ["mlp"]\nsparsity_over = "all"\nsparsities = [0.1, 0.2]'
    expansion = prepared(("sparsities = [0.5, 0.7]", more)).expansion
    recipes = [case.recipe for case in expansion.cases if case.recipe]
    assert len(recipes) == 16
    assert {(r.keep, r.only, r.sparsity_over) for r in recipes} == {(("first:1",), ("mlp",), "all")}


RATIOS = """
[[top_ups]]
name = "uniform"

[[top_ups]]
name = "uniform"
label = "less attention"
[[top_ups.ratios]]
match = "*.self_attn.*"
sparsity = 0.2
[[top_ups.ratios]]
match = "last:1"
sparsity = [0.3, 0.4]
"""


def test_ratios_may_be_given_in_place_of_a_search(prepared: Change, desk: Path) -> None:
    change = ('top_ups = ["uniform", "owl"]\n', ""), ("[calibration]", f"{RATIOS}\n[calibration]")
    expansion = prepared(*change).expansion
    given = [c for c in expansion.cases if c.labels["top_up"] == "less attention"]
    assert len(given) == 8 and not expansion.skipped
    for case in given:
        assert case.recipe is not None and case.recipe.sparsity == case.labels["sparsity"]
        assert case.recipe.ratios == (
            GivenRatio("*.self_attn.*", 0.2),
            GivenRatio("last:1", (0.3, 0.4)),
        )
    assert len(expansion.distinct) == len(expansion.cases)
    now = prepared(("sparsity = 0.2", "sparsity = 0.25")).expansion
    moved = [a.id != b.id for a, b in zip(expansion.cases, now.cases, strict=True)]
    assert moved == [c.labels["top_up"] == "less attention" for c in expansion.cases]


def test_what_makes_no_sense_is_skipped(prepared: Change) -> None:
    expansion = prepared(
        ('"owl"', '"neuroal-row"'), ('"wanda"', '"sparsegpt"'), ("[0.5, 0.7]", "[0.5]")
    ).expansion
    (one, other) = expansion.skipped
    assert (one.labels["model"], other.labels["model"]) == ("llama", "opt")
    assert one.labels["pruner"] == "sparsegpt"
    assert one.reason.startswith("top-up 'neuroal-row' is a row step alone, and the mask of")
    assert len(expansion.cases) == 2 * (1 + 3)


def test_patterns_have_a_sparsity_of_their_own(prepared: Change) -> None:
    expansion = prepared(
        ("sparsities = [0.5, 0.7]", 'patterns = ["unstructured", "2:4", "1:4"]'),
    ).expansion
    found = {(c.labels["pattern"], c.labels["sparsity"]) for c in expansion.cases if c.recipe}
    assert found == {("unstructured", 0.5), ("2:4", 0.5), ("1:4", 0.75)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"wanda"',
            '"wnda"',
            "pruners[2]: unknown pruner 'wnda': did you mean 'wanda'?",
        ),
        ('"owl"', '"neuraol"', "unknown top_up 'neuraol': did you mean 'neuroal'?"),
        ('"owl"', '{name = "owl", options = {owl = {N = 4}}}', "plugin 'owl' has no option 'N'"),
        (
            '"wanda"',
            '{name = "ria", options = {a = "x"}}',
            "option ria.a='x' is not float (no combination is left of pruners 'ria')",
        ),
        ("sparsities", 'patterns = ["3:7"]\nsparsities', "pattern 3:7 does not divide"),
    ],
)
def test_an_entry_that_is_wrong_by_itself(
    prepared: Change, old: str, new: str, message: str
) -> None:
    with pytest.raises(UsageError) as error:
        prepared((old, new))
    assert str(error.value).startswith("study 'study.toml': ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"opt"]', '"nowhere/at all"]', "models[2] 'at all': model 'nowhere/at all' is neither"),
        ('"opt"]', '"."]', "models[2]"),
        ('source = "rows.jsonl"', "", "models[1] 'llama': give it calibration"),
        ('source = "rows.jsonl"', 'source = "rws.jsonl"', "source 'rws.jsonl' does not exist"),
        (
            'data = "text.txt"',
            'data = "test.txt"',
            "evaluations[2]: no such file: source 'test.txt'",
        ),
    ],
)
def test_what_is_not_there(prepared: Change, old: str, new: str, message: str) -> None:
    with pytest.raises(NeuroalError) as error:
        prepared((old, new))
    assert message in str(error.value)


def test_a_model_may_have_its_own_calibration(prepared: Change) -> None:
    change = ('"opt"]', '{name = "opt", calibration = "text.txt", dtype = "bfloat16"}]')
    cases = prepared(change).expansion.cases
    first, last = cases[1].recipe, cases[-1].recipe
    assert first is not None and last is not None
    assert (first.calibration, first.dtype) == ("rows.jsonl", "float32")
    assert (last.calibration, last.dtype) == ("text.txt", "bfloat16")
