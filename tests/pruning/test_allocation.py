"""Ratios to counts: the exact budget, the published roundings, N:M, and what is refused."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from neuroal import Block, Importance, Layout, NeuroalError, Pattern, Target
from neuroal.pruning.allocation import FILE, Allocation, read, to_bytes
from neuroal.pruning.budget import HIGHEST, project
from neuroal.pruning.masks import mask_for
from neuroal.pruning.targets import Rules, as_pruned, targets
from neuroal.testing import layout, linear

unit = st.floats(0, 1)
below_one = st.floats(0, 1, exclude_max=True)
sizes = st.integers(1, 9)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    linears = draw(st.integers(1, 3))
    shapes = {f"l{k}": (draw(sizes), draw(sizes)) for k in range(linears)}
    return layout(draw(st.integers(1, 3)), shapes)


@st.composite
def allocations(draw: st.DrawFn) -> tuple[Layout, Allocation]:
    """A layout and any ratios for it, per linear or per row."""
    found = draw(layouts())
    if draw(st.booleans()):
        return found, Allocation.of({name: draw(unit) for name in found.linears}, found)
    rows = {
        name: torch.tensor(
            draw(st.lists(unit, min_size=x.out_features, max_size=x.out_features)),
            dtype=torch.float64,
        )
        for name, x in found.linears.items()
    }
    return found, Allocation.of(rows, found)


def uniform(found: Layout, ratio: float) -> Allocation:
    return Allocation.of(dict.fromkeys(found.linears, ratio), found)


def total(made: dict[str, Target]) -> int:
    return sum(int(t.counts.sum()) for t in made.values())


# -- exact budget ----------------------------------------------------------------------------


@given(allocations(), below_one, st.sampled_from(["row", "matrix"]))
def test_exact_budget_is_met_to_the_weight(
    case: tuple[Layout, Allocation], sparsity: float, comparison: str
) -> None:
    found, allocation = case
    made = targets(allocation, found, Rules(sparsity, comparison=comparison))  # type: ignore[arg-type]
    assert list(made) == list(found.linears)
    assert total(made) == math.floor(sparsity * found.weights + 0.5)
    for name, target in made.items():
        x = found.linears[name]
        rows = (x.out_features,) if comparison == "row" else (1,)
        assert target.counts.shape == rows and target.counts.dtype == torch.int64
        assert target.counts.min() >= 0
        assert target.counts.max() <= (x.in_features if comparison == "row" else x.weights)
        assert target.comparison == comparison and target.budget == "exact"
        assert 0 <= target.ratio <= max(HIGHEST, sparsity + 1 / found.weights)
        assert abs(int(target.counts.sum()) - target.ratio * x.weights) < 1 + 1e-6
        assert target.pattern is None and not target.prune_last


@given(allocations(), below_one)
def test_every_row_is_within_one_of_its_share(
    case: tuple[Layout, Allocation], sparsity: float
) -> None:
    found, allocation = case
    for name, target in targets(allocation, found, Rules(sparsity)).items():
        x, count = found.linears[name], int(target.counts.sum())
        wanted = torch.full((x.out_features,), count / x.out_features, dtype=torch.float64)
        if name in allocation.rows:
            ones = torch.ones(x.out_features, dtype=torch.float64)
            wanted = project(allocation.rows[name], ones, count / x.weights) * x.in_features
        assert (target.counts - wanted).abs().max() < 1 + 1e-6


@given(layouts(), below_one)
def test_uniform_rows_differ_by_one_at_most_and_the_first_have_more(
    found: Layout, sparsity: float
) -> None:
    for target in targets(uniform(found, sparsity), found, Rules(sparsity)).values():
        counts = target.counts.tolist()
        assert counts == sorted(counts, reverse=True)
        assert counts[0] - counts[-1] <= 1


def test_exact_budget_by_hand() -> None:
    # 2 x (4 x 5) weights; 0.33 of 40 is 13.2: 13, of which the first linear gets 6.5, rounded up.
    found = layout(2, {"a": (4, 5)})
    made = targets(uniform(found, 0.33), found, Rules(0.33))
    assert made["blocks.0.a"].counts.tolist() == [2, 2, 2, 1]
    assert made["blocks.1.a"].counts.tolist() == [2, 2, 1, 1]
    assert made["blocks.0.a"].ratio == pytest.approx(13 / 40)


def test_rows_by_hand() -> None:
    # Shares 1, 2.5, 2.5, 4 of 5: the sum is 10, and the first of the equal remainders goes up.
    found = layout(1, {"a": (4, 5)})
    rows = torch.tensor([0.2, 0.5, 0.5, 0.8], dtype=torch.float64)
    made = targets(Allocation.of({"blocks.0.a": rows}, found), found, Rules(0.5))
    assert made["blocks.0.a"].counts.tolist() == [1, 3, 2, 4]


def test_products_that_are_meant_to_be_whole_are_whole() -> None:
    # 100 * 0.58 is 57.99999999999999 in binary.
    found = layout(2, {"a": (3, 100)})
    made = targets(uniform(found, 0.58), found, Rules(0.58))
    assert all(t.counts.tolist() == [58, 58, 58] for t in made.values())


def test_ratios_that_miss_the_budget_are_shifted_by_one_constant() -> None:
    found = layout(2, {"a": (10, 10)})
    allocation = Allocation.of({"blocks.0.a": 0.2, "blocks.1.a": 0.4}, found)
    made = targets(allocation, found, Rules(0.5))
    assert [int(t.counts.sum()) for t in made.values()] == [40, 60]


def test_nothing_and_nearly_everything() -> None:
    found = layout(2)
    assert total(targets(uniform(found, 0.7), found, Rules(0.0))) == 0
    made = targets(uniform(found, 0.3), found, Rules(0.999))
    assert total(made) == math.floor(0.999 * found.weights + 0.5)


@given(allocations(), st.booleans())
def test_a_probe_keeps_its_own_ratios(case: tuple[Layout, Allocation], matrix: bool) -> None:
    found, allocation = case
    rules = Rules(0.5, comparison="matrix" if matrix else "row")
    made = targets(allocation, found, rules, probe=True)
    wanted = sum(allocation.ratios[name] * x.weights for name, x in found.linears.items())
    assert abs(total(made) - wanted) <= 0.5 + 1e-6
    for name, target in made.items():
        assert target.ratio == allocation.ratios[name]
        share = target.ratio * found.linears[name].weights
        assert abs(int(target.counts.sum()) - share) < 1 + 1e-6


# -- paper budget ----------------------------------------------------------------------------


def paper(found: Layout, ratios: dict[str, float | Tensor], **rules: str) -> dict[str, Target]:
    return targets(Allocation.of(ratios, found), found, Rules(0.7, "paper", **rules))  # type: ignore[arg-type]


def test_paper_rounds_down_in_every_row() -> None:
    # 192 * 0.4999 = 95.98
    target = paper(layout(1, {"a": (3, 192)}), {"blocks.0.a": 0.4999})["blocks.0.a"]
    assert target.counts.tolist() == [95, 95, 95]
    assert (target.ratio, target.budget, target.prune_last) == (0.4999, "paper", False)


def test_paper_rounds_what_rows_keep_down() -> None:
    # Kept: int(10 * 0.75) = 7, int(10 * 0.45) = 4, int(10 * 0.01) = 0, all.
    rows = torch.tensor([0.25, 0.55, 0.99, 0.0], dtype=torch.float64)
    target = paper(layout(1, {"a": (4, 10)}), {"blocks.0.a": rows})["blocks.0.a"]
    assert target.counts.tolist() == [3, 6, 10, 0]
    assert target.prune_last
    assert target.ratio == pytest.approx(0.4475)


def test_paper_prunes_one_more_per_row_where_rows_have_ratios() -> None:
    found = layout(1, {"a": (2, 192)})
    rows = torch.full((2,), 0.7, dtype=torch.float64)
    assert paper(found, {"blocks.0.a": 0.7})["blocks.0.a"].counts.tolist() == [134, 134]
    assert paper(found, {"blocks.0.a": rows})["blocks.0.a"].counts.tolist() == [135, 135]


@given(layouts(), below_one)
def test_paper_does_not_project(found: Layout, ratio: float) -> None:
    ratios: dict[str, float | Tensor] = dict.fromkeys(found.linears, ratio)
    for name, target in paper(found, ratios).items():
        x = found.linears[name]
        assert target.counts.tolist() == [int(x.in_features * ratio)] * x.out_features
    for name, target in paper(found, ratios, comparison="matrix").items():
        assert target.counts.tolist() == [int(found.linears[name].weights * ratio)]


# -- N:M -------------------------------------------------------------------------------------

PATTERNED = {"a": (3, 8), "b": (5, 16)}


def unequal(heights: list[int], width: int) -> Layout:
    """Blocks of one linear each, of different heights."""
    linears = [linear(h, width, name=f"blocks.{b}.a", block=b) for b, h in enumerate(heights)]
    return Layout(tuple(Block(x.block, f"blocks.{x.block}", (x,)) for x in linears))


def test_a_fixed_pattern_is_its_own_budget() -> None:
    found = layout(2, PATTERNED)
    made = targets(uniform(found, 0.9), found, Rules(0.5, pattern=Pattern(2, 4)))
    assert all(t.pattern == Pattern(2, 4) and t.ratio == 0.5 for t in made.values())
    assert made["blocks.0.a"].counts.tolist() == [4, 4, 4]
    assert made["blocks.1.b"].counts.tolist() == [8] * 5


def test_a_varying_pattern_by_hand() -> None:
    # 0.9 is above 3/4: clipped, and the others rise by 0.075. Of every 4 go 1.5, 2.7 and 3; the
    # floors leave 1.2 of the 7.2 steps, of which the largest remainder gets one.
    found = layout(3, {"a": (2, 8)})
    allocation = Allocation.of({"blocks.0.a": 0.3, "blocks.1.a": 0.6, "blocks.2.a": 0.9}, found)
    rules = Rules(0.6, pattern=Pattern(2, 4), varies=True)
    made = targets(allocation, found, rules)
    assert [str(t.pattern) for t in made.values()] == ["3:4", "1:4", "1:4"]
    assert [t.ratio for t in made.values()] == [0.25, 0.75, 0.75]


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.lists(unit, min_size=5, max_size=5),
    st.sampled_from([2, 4, 8]),
    below_one,
)
def test_a_varying_pattern_meets_the_sparsity_to_one_step(
    heights: list[int], ratios: list[float], of: int, sparsity: float
) -> None:
    """To half a step of the smallest block that has a step left."""
    found = unequal(heights, 2 * of)
    allocation = Allocation.of(dict(zip(found.linears, ratios, strict=False)), found)
    made = targets(allocation, found, Rules(sparsity, pattern=Pattern(1, of), varies=True))
    pruned = [t.pattern.of - t.pattern.kept for t in made.values() if t.pattern]
    assert all(0 <= p < of for p in pruned) and len(pruned) == len(heights)
    excess = total(made) - sparsity * found.weights
    able = [
        2 * h for h, p in zip(heights, pruned, strict=True) if (p > 0 if excess > 0 else p < of - 1)
    ]
    if able:
        assert abs(excess) <= min(able) / 2 + 1e-6
    for target in made.values():
        assert target.pattern is not None
        assert target.ratio * of == target.pattern.of - target.pattern.kept


def test_a_probe_keeps_its_own_pattern() -> None:
    found = layout(2, {"a": (2, 8)})
    allocation = Allocation.of({"blocks.0.a": 0.25, "blocks.1.a": 1.0}, found)
    rules = Rules(0.5, pattern=Pattern(2, 4), varies=True)
    made = targets(allocation, found, rules, probe=True)
    assert [str(t.pattern) for t in made.values()] == ["3:4", "1:4"]


def test_linears_that_stay_dense_have_no_target() -> None:
    found = layout(2, {"a": (3, 8), "odd": (4, 6)})
    dense = dict.fromkeys(["blocks.0.odd", "blocks.1.odd"], "odd")
    rules = Rules(0.5, pattern=Pattern(2, 4), dense=dense)
    assert list(targets(uniform(found, 0.5), found, rules)) == ["blocks.0.a", "blocks.1.a"]


def test_a_varying_pattern_weighs_only_what_it_prunes() -> None:
    found = layout(2, {"a": (3, 8), "odd": (4, 6)})
    dense = dict.fromkeys(["blocks.0.odd", "blocks.1.odd"], "odd")
    ratios = {"blocks.0.a": 0.25, "blocks.1.a": 0.75, "blocks.0.odd": 0.9, "blocks.1.odd": 0.9}
    rules = Rules(0.5, pattern=Pattern(2, 4), varies=True, dense=dense)
    made = targets(Allocation.of(ratios, found), found, rules)
    assert [t.ratio for t in made.values()] == [0.25, 0.75]


# -- allocations -----------------------------------------------------------------------------


def test_an_allocation_of_numbers_has_no_rows() -> None:
    found = layout(1)
    ratios: dict[str, float | Tensor] = dict.fromkeys(found.linears, 0.5)
    ratios["blocks.0.q"] = torch.tensor(0.25)  # a number too
    made = Allocation.of(ratios, found)
    assert made.rows == {}
    assert made.ratios["blocks.0.q"] == 0.25
    assert list(made.ratios) == list(found.linears)


def test_one_tensor_of_rows_makes_it_a_row_allocation() -> None:
    found = layout(1)
    ratios: dict[str, float | Tensor] = dict.fromkeys(found.linears, 0.5)
    rows = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    ratios["blocks.0.q"] = rows
    made = Allocation.of(ratios, found)
    assert made.rows["blocks.0.q"].equal(rows) and made.rows["blocks.0.q"] is not rows
    assert made.rows["blocks.0.up"].equal(torch.full((6,), 0.5, dtype=torch.float64))
    assert made.ratios["blocks.0.q"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"blocks.0.extra": 0.5}, "'blocks.0.extra'"),
        ({"blocks.0.up": None}, "'blocks.0.up'"),
        ({"blocks.0.up": 1.01}, r"'blocks.0.up' is not in \[0, 1\]"),
        ({"blocks.0.up": -0.01}, r"'blocks.0.up' is not in \[0, 1\]"),
        ({"blocks.0.up": float("nan")}, r"'blocks.0.up' is not in \[0, 1\]"),
        ({"blocks.0.up": torch.full((6,), 2.0)}, r"'blocks.0.up' is not in \[0, 1\]"),
        ({"blocks.0.up": torch.full((4,), 0.5)}, r"'blocks.0.up' have shape \(4,\), not \(6,\)"),
        ({"blocks.0.up": torch.full((6, 1), 0.5)}, r"shape \(6, 1\), not \(6,\)"),
    ],
)
def test_wrong_ratios_are_refused_by_name(
    change: dict[str, float | Tensor | None], problem: str
) -> None:
    found = layout(1)
    ratios = dict.fromkeys(found.linears, 0.5) | change
    given = {name: r for name, r in ratios.items() if r is not None}
    with pytest.raises(NeuroalError, match=problem):
        Allocation.of(given, found)


# -- importance of rows ------------------------------------------------------------------------


@st.composite
def weighed(draw: st.DrawFn) -> tuple[Layout, Allocation]:
    """An allocation of numbers, of which some linears have importance of rows."""
    found, allocation = draw(allocations())
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    names = draw(st.lists(st.sampled_from(list(found.linears)), unique=True))

    def drawn(size: int) -> Tensor:
        return torch.rand(size, generator=rng, dtype=torch.float64) + 0.1

    rows = {n: drawn(found.linears[n].out_features) for n in names}
    inputs = {n: drawn(found.linears[n].in_features) for n in names[: draw(st.integers(0, 9))]}
    importance = {n: Importance(x, inputs.get(n)) for n, x in rows.items()}
    return found, Allocation.of(allocation.ratios, found, importance)


@given(weighed(), below_one, st.sampled_from(["row", "matrix"]))
def test_importance_keeps_the_exact_budget(
    case: tuple[Layout, Allocation], sparsity: float, comparison: str
) -> None:
    """Every linear loses as many weights as without; the rows that have importance compete."""
    found, allocation = case
    rules = Rules(sparsity, comparison=comparison)  # type: ignore[arg-type]
    made = targets(allocation, found, rules)
    plain = targets(Allocation(allocation.ratios), found, rules)
    assert total(made) == math.floor(sparsity * found.weights + 0.5)
    for name, target in made.items():
        assert int(target.counts.sum()) == int(plain[name].counts.sum())
        if name in allocation.importance:
            assert target.comparison == "matrix" and target.budget == "exact"
            assert target.counts.shape == (1,)
        else:
            assert target.comparison == comparison
        given_, scaled = allocation.importance.get(name), target.importance
        for side in ("rows", "inputs"):
            values, made_ = getattr(given_, side, None), getattr(scaled, side, None)
            if values is None or len(values) == 1:  # what is alone counts like itself
                assert made_ is None or (side == "rows" and bool((made_ == 1).all()))
                continue
            assert torch.allclose(made_ / made_.max(), (values / values.max()).float())
            assert 0.5 <= float(made_.max()) <= 1


def test_importance_under_the_paper_budget_rounds_the_matrix_down() -> None:
    found = layout(1, {"a": (3, 7), "b": (2, 3)})
    importance = {"blocks.0.a": Importance(torch.tensor([1.0, 2.0, 0.5]))}
    allocation = Allocation.of({"blocks.0.a": 0.6, "blocks.0.b": 0.6}, found, importance)
    made = targets(allocation, found, Rules(0.6, "paper"))
    a, b = made["blocks.0.a"], made["blocks.0.b"]
    assert (a.counts.tolist(), a.comparison, a.budget) == ([int(21 * 0.6)], "matrix", "paper")
    assert a.importance is not None and a.importance.rows.tolist() == [0.25, 0.5, 0.125]
    assert a.importance.inputs is None
    assert (b.counts.tolist(), b.comparison, b.importance) == ([1, 1], "row", None)


@pytest.mark.parametrize(
    ("importance", "problem"),
    [
        ({"blocks.0.extra": torch.ones(6)}, "differ in linear 'blocks.0.extra'"),
        ({"blocks.0.up": torch.ones(4)}, r"'blocks.0.up' has shape \(4,\), not \(6,\)"),
        ({"blocks.0.up": torch.ones(6, 1)}, r"'blocks.0.up' has shape \(6, 1\), not \(6,\)"),
        ({"blocks.0.up": torch.tensor(2.0)}, r"'blocks.0.up' has shape \(\), not \(6,\)"),
        ({"blocks.0.up": 2.0}, "'blocks.0.up' is float, not a floating tensor"),
        ({"blocks.0.up": None}, "'blocks.0.up' is NoneType, not a floating tensor"),
        ({"blocks.0.up": torch.ones(6).bool()}, "'blocks.0.up' is torch.bool, not a floating"),
        ({"blocks.0.up": torch.ones(6) * 1j}, "'blocks.0.up' is torch.complex64, not a floating"),
        *(
            ({"blocks.0.up": torch.tensor([1, 1, 1, 1, 1, wrong])}, "'blocks.0.up' is not positive")
            for wrong in (0.0, -1.0, math.inf, math.nan)
        ),
        (
            {"blocks.0.up": torch.tensor([1, 1, 1, 1, 1e-7, 2e5])},
            r"'blocks.0.up' is from 1e-07 to 2e\+05, further apart than a factor of 1e\+12",
        ),
        (
            {"blocks.0.up": torch.tensor([5e-324, 1e308] * 3, dtype=torch.float64)},
            "'blocks.0.up' is from",
        ),
    ],
)
def test_wrong_importance_is_refused_by_name(importance: dict[str, Tensor], problem: str) -> None:
    found, rows = layout(1), {n: Importance(x) for n, x in importance.items()}
    with pytest.raises(NeuroalError, match=problem):
        Allocation.of(dict.fromkeys(found.linears, 0.5), found, rows)


def test_importance_is_of_rows_and_inputs_together() -> None:
    found, bare = layout(1), {"blocks.0.up": torch.ones(6)}
    problem = r"importance of 'blocks.0.up' is Tensor, not Importance\(rows, inputs\)"
    with pytest.raises(NeuroalError, match=problem):
        Allocation.of(dict.fromkeys(found.linears, 0.5), found, bare)  # type: ignore[arg-type]


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6),
    st.integers(-1000, 1000),
)
def test_only_proportions_of_importance_count(drawn: list[float], exponent: int) -> None:
    """To the bit, however large or small; in float32 as a float64 quotient says."""
    assume(len(set(drawn)) > 1)
    found = layout(1, {"up": (len(drawn), 2)})
    values = torch.tensor(drawn, dtype=torch.float64)
    made = []
    for given_ in (values, values * 2.0**exponent):
        weighed_ = {"blocks.0.up": Importance(given_)}
        allocation = Allocation.of({"blocks.0.up": 0.5}, found, weighed_)
        importance = targets(allocation, found, Rules(0.5))["blocks.0.up"].importance
        assert importance is not None and importance.rows.dtype == torch.float32
        made.append(importance.rows)
    assert made[0].equal(made[1])
    assert 0.5 <= float(made[0].max()) <= 1 and float(made[0].min()) > 1e-13
    factor = float(made[0].max()) / float(values.float().max())
    assert math.frexp(factor)[0] == 0.5  # a power of two: no bit of a product changes
    assert made[0].equal(values.float() * factor)


@pytest.mark.parametrize("value", [1.0, 0.7, 1e300])
def test_rows_of_one_importance_are_the_plain_matrix(value: float) -> None:
    """A pruner that moves weights is given them as they are, whose bits no factor keeps."""
    found = layout(1)
    importance = {"blocks.0.up": Importance(torch.full((6,), value, dtype=torch.float64))}
    allocation = Allocation.of(dict.fromkeys(found.linears, 0.5), found, importance)
    target = targets(allocation, found, Rules(0.5))["blocks.0.up"]
    plain = targets(uniform(found, 0.5), found, Rules(0.5, comparison="matrix"))["blocks.0.up"]
    assert target.importance is None and target.comparison == "matrix"
    assert target.counts.equal(plain.counts) and target.ratio == plain.ratio


def test_importance_of_any_size_keeps_scores_finite_and_apart() -> None:
    """Scores near the largest float32, under importance of 1e300."""
    found = layout(1, {"up": (2, 3)})
    importance = {"blocks.0.up": Importance(torch.tensor([3e300, 1e300], dtype=torch.float64))}
    allocation = Allocation.of({"blocks.0.up": 0.5}, found, importance)
    target = targets(allocation, found, Rules(0.5))["blocks.0.up"]
    scores = torch.tensor([[1e38, 2e38, 3e38], [1e38, 2e38, 3.4e38]])
    assert mask_for(scores, target).int().tolist() == [[1, 0, 0], [1, 1, 0]]


def test_wrong_importance_of_inputs_is_refused_by_name() -> None:
    found, name = layout(1), "blocks.0.up"
    ratios = dict.fromkeys(found.linears, 0.5)
    columns = found.linears[name].in_features
    for inputs, problem in (
        (torch.ones(columns + 1), rf"inputs of '{name}' has shape \({columns + 1},\)"),
        (torch.zeros(columns), f"inputs of '{name}' is not positive and finite"),
        ([1.0] * columns, f"inputs of '{name}' is list, not a floating tensor"),
    ):
        importance = Importance(torch.ones(6), inputs)  # type: ignore[arg-type]
        with pytest.raises(NeuroalError, match=problem):
            Allocation.of(ratios, found, {name: importance})


def test_ratios_and_importance_of_rows_exclude_each_other() -> None:
    found = layout(1)
    ratios: dict[str, float | Tensor] = dict.fromkeys(found.linears, 0.5)
    ratios["blocks.0.q"] = torch.tensor([0.4, 0.5, 0.5, 0.6])
    with pytest.raises(NeuroalError, match="ratios of rows or importance of rows, not both"):
        Allocation.of(ratios, found, {"blocks.0.up": Importance(torch.ones(6))})


# -- files -----------------------------------------------------------------------------------


@given(allocations())
def test_a_file_holds_every_bit(case: tuple[Layout, Allocation]) -> None:
    found, allocation = case
    with TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(to_bytes(allocation, found))
        for path in (Path(folder), Path(folder) / FILE):
            again = read(path, found)
            assert again.ratios == allocation.ratios
            if all(x.out_features == 1 for x in found.linears.values()):
                continue  # a row's ratio is its linear's
            assert again.rows.keys() == allocation.rows.keys()
            assert all(again.rows[n].equal(r) for n, r in allocation.rows.items())


@given(weighed())
def test_a_file_holds_every_bit_of_importance(case: tuple[Layout, Allocation]) -> None:
    found, allocation = case
    with TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(to_bytes(allocation, found))
        again = read(Path(folder), found)
    assert again.ratios == allocation.ratios and again.rows == {}
    assert again.importance.keys() == allocation.importance.keys()
    for name, made in allocation.importance.items():
        kept = again.importance[name]
        assert kept.rows.equal(made.rows)
        assert (kept.inputs is None) == (made.inputs is None)
        assert made.inputs is None or (kept.inputs is not None and kept.inputs.equal(made.inputs))


def test_a_file_is_byte_for_byte_the_same() -> None:
    found = layout(2)
    assert to_bytes(uniform(found, 0.3), found) == to_bytes(uniform(found, 0.3), found)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(to_bytes(uniform(layout(3), 0.3), layout(3)))
    with pytest.raises(NeuroalError, match=r"does not fit the model: .* 'blocks\.2\.down'"):
        read(path, layout(2))


def test_a_broken_or_strange_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with pytest.raises(NeuroalError, match="cannot read"):
        read(path, layout(1))
    path.write_bytes(b"nothing")
    with pytest.raises(NeuroalError, match="cannot read"):
        read(path, layout(1))
    path.write_bytes(save({name: torch.zeros(0) for name in layout(1).linears}))
    with pytest.raises(NeuroalError, match=r"is no allocation: .* float32 \(0,\), not floating"):
        read(path, layout(1))


def test_the_allocation_of_a_run_is_what_its_budget_made_of_it() -> None:
    found = layout(2, {"a": (4, 10)})  # 80 weights
    shifted = Allocation.of({"blocks.0.a": 0.2, "blocks.1.a": 0.4}, found)
    done = as_pruned(shifted, found, targets(shifted, found, Rules(0.5)))
    assert done.ratios == pytest.approx({"blocks.0.a": 0.4, "blocks.1.a": 0.6})
    rows = torch.tensor([0.1, 0.1, 0.3, 0.3], dtype=torch.float64)
    by_row = Allocation.of(dict.fromkeys(found.linears, rows), found)
    done = as_pruned(by_row, found, targets(by_row, found, Rules(0.4)))
    for name in found.linears:
        assert done.ratios[name] == pytest.approx(0.4)
        assert done.rows[name].tolist() == pytest.approx([0.3, 0.3, 0.5, 0.5])
    uneven = Allocation.of(dict.fromkeys(found.linears, 0.333), found)  # 26.64 weights: 27
    assert as_pruned(uneven, found, targets(uneven, found, Rules(0.333))) is uneven
