"""Masks against a plain Python sort, and by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuroal import Importance, Pattern, Target
from neuroal.pruning import masks
from neuroal.pruning.masks import mask_for, pattern_mask, row_mask, with_zeros

# Few distinct values: most rows hold ties. All are exact in half precision.
VALUES = st.sampled_from([-2.0, -0.5, -0.0, 0.0, 0.25, 1.0, 3.0])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores `(rows, columns)` and counts `(rows,)`, 0 and all of a row among them."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    values = draw(st.lists(VALUES, min_size=rows * columns, max_size=rows * columns))
    counts = draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    scores = torch.tensor(values, dtype=draw(DTYPES)).reshape(rows, columns)
    return scores, torch.tensor(counts)


def slow_row(scores: list[float], count: int, prune_last: bool = False) -> list[bool]:
    """Sort the columns by score, then by index; the first `count` go."""
    sign = -1 if prune_last else 1
    order = sorted(range(len(scores)), key=lambda j: (scores[j], sign * j))
    gone = set(order[:count])
    return [j in gone for j in range(len(scores))]


@given(problems(), st.booleans())
def test_row_mask_is_a_plain_sort(problem: tuple[Tensor, Tensor], prune_last: bool) -> None:
    scores, counts = problem
    mask = row_mask(scores, counts, prune_last)
    pairs = zip(scores.tolist(), counts.tolist(), strict=True)
    assert mask.tolist() == [slow_row(row, count, prune_last) for row, count in pairs]
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).equal(counts)


@given(problems())
def test_order_of_distinct_scores_decides_alone(problem: tuple[Tensor, Tensor]) -> None:
    """Without ties a permutation of the columns permutes the mask."""
    _, counts = problem
    scores = torch.rand(problem[0].shape)
    order = torch.randperm(scores.shape[1])
    assert row_mask(scores[:, order], counts).equal(row_mask(scores, counts)[:, order])


@given(problems())
def test_prune_last_is_the_mirror_image(problem: tuple[Tensor, Tensor]) -> None:
    scores, counts = problem
    mirrored = row_mask(scores.flip(1), counts).flip(1)
    assert row_mask(scores, counts, prune_last=True).equal(mirrored)


@given(problems())
def test_more_is_a_superset(problem: tuple[Tensor, Tensor]) -> None:
    scores, counts = problem
    more = (counts + 1).clamp(max=scores.shape[1])
    assert not (row_mask(scores, counts) & ~row_mask(scores, more)).any()


@given(problems(), st.booleans())
def test_whole_tensors_give_the_same_mask(problem: tuple[Tensor, Tensor], prune_last: bool) -> None:
    """What runs on other devices, here on the CPU."""
    scores, counts = problem
    assert masks._mask_on_device(scores, counts, prune_last).equal(
        row_mask(scores, counts, prune_last)
    )


@given(problems(), st.integers(1, 40))
def test_pieces_of_any_size_give_the_same_mask(problem: tuple[Tensor, Tensor], size: int) -> None:
    expected = row_mask(*problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "CHUNK", size)
        assert row_mask(*problem).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeroed_weights_keep_the_bits_of_the_others(dtype: torch.dtype) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    weight = torch.tensor([[-0.0, 1.1, -2.3, torch.finfo(dtype).tiny, -5.0]], dtype=dtype)
    mask = torch.tensor([[False, True, False, False, True]])
    found = masks.zeroed(weight, mask)
    expected = weight.clone()
    expected[mask] = 0.0
    assert found.dtype == dtype and found.view(bits).equal(expected.view(bits))
    assert masks.zeroed(weight.t(), mask.t()).equal(found.t())
    assert weight[0, 1] != 0


def test_ties_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0, 1.0, 2.0]])
    lower = row_mask(scores, torch.tensor([3]))
    assert lower.tolist() == [[True, True, True, False, False]]
    upper = row_mask(scores, torch.tensor([3]), prune_last=True)
    assert upper.tolist() == [[False, True, True, True, False]]


def test_equal_scores_everywhere() -> None:
    scores, counts = torch.zeros(3, 4), torch.tensor([0, 1, 4])
    assert row_mask(scores, counts).int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    last = row_mask(scores, counts, prune_last=True)
    assert last.int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]]


def test_one_row_and_one_column() -> None:
    assert row_mask(torch.tensor([[3.0, 1.0]]), torch.tensor([1])).tolist() == [[False, True]]
    column = torch.tensor([[3.0], [1.0], [2.0]])
    assert row_mask(column, torch.tensor([1, 0, 1])).tolist() == [[True], [False], [True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_ties_are_those_of_its_own_rounding(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, 1.0 + 2**-12, 0.5]])
    assert row_mask(scores.flip(1), torch.tensor([2])).tolist() == [[True, False, True]]
    assert row_mask(scores.flip(1).to(dtype), torch.tensor([2])).tolist() == [[True, True, False]]


def test_one_count_holds_in_every_row() -> None:
    scores = torch.rand(4, 6)
    expected = row_mask(scores, torch.full((4,), 2))
    assert row_mask(scores, torch.tensor([2])).equal(expected)


def test_no_rows_or_no_columns() -> None:
    assert row_mask(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 4)
    assert row_mask(torch.zeros(2, 0), torch.tensor([0, 0])).shape == (2, 0)


def test_arguments_are_not_changed() -> None:
    scores, counts = torch.rand(3, 5), torch.tensor([1, 2, 3])
    before = scores.clone(), counts.clone()
    row_mask(scores, counts)
    assert scores.equal(before[0]) and counts.equal(before[1])


@given(problems(), st.data())
def test_matrix_mask_is_one_long_row(problem: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    scores, _ = problem
    count = data.draw(st.integers(0, scores.numel()))
    prune_last = data.draw(st.booleans())
    target = Target(
        torch.tensor([count]), count / scores.numel(), comparison="matrix", prune_last=prune_last
    )
    expected = slow_row(scores.flatten().tolist(), count, prune_last)
    assert mask_for(scores, target).flatten().tolist() == expected


@given(problems(), st.integers(1, 4), st.data())
def test_pattern_mask_keeps_the_best_of_every_group(
    problem: tuple[Tensor, Tensor], of: int, data: st.DataObject
) -> None:
    scores = problem[0].repeat(1, of)
    kept = data.draw(st.integers(0, of))
    mask = pattern_mask(scores, Pattern(kept, of))
    for row, pruned in zip(scores.tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), of):
            group = slice(start, start + of)
            assert pruned[group] == slow_row(row[group], of - kept)


def test_pattern_by_hand() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 7.0, 7.0, 7.0, 7.0]])
    mask = pattern_mask(scores, Pattern(2, 4))
    assert mask.int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]
    assert pattern_mask(scores, Pattern(4, 8)).int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


@given(problems(), st.booleans())
def test_mask_for_rows_is_the_row_mask(problem: tuple[Tensor, Tensor], prune_last: bool) -> None:
    scores, counts = problem
    target = Target(counts, 0.5, prune_last=prune_last)
    assert mask_for(scores, target).equal(row_mask(scores, counts, prune_last))


def test_mask_for_takes_the_pattern_first() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    target = Target(torch.tensor([2]), 0.5, Pattern(1, 2))
    assert mask_for(scores, target).int().tolist() == [[1, 0, 1, 0]]


def rows_pruned(weight: Tensor, scores: Tensor, counts: Tensor, last: bool) -> Tensor:
    full = scores if scores.dim() == 2 else weight.float().abs() * scores
    return weight.masked_fill(row_mask(full, counts, last), 0)


@given(problems(), st.booleans(), DTYPES, st.integers(1, 40))
def test_rows_are_pruned_in_pieces_as_by_their_mask(
    problem: tuple[Tensor, Tensor], last: bool, dtype: torch.dtype, size: int
) -> None:
    scores, counts = problem
    weight = (scores - 1).to(dtype)
    before = weight.clone()
    norm = scores[0].float().abs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "CHUNK", size)
        for given in (scores, norm):
            out, finite = masks.prune_rows(weight, given, counts, last)
            whole, also_finite = masks._prune_rows_whole(weight, given, counts, last)
            assert out.equal(whole) and also_finite
            assert out.dtype == dtype and out.equal(rows_pruned(weight, given, counts, last))
            assert finite and finite.dtype == torch.bool and finite.dim() == 0
    assert weight.equal(before)


def test_one_count_holds_in_every_row_and_survivors_keep_their_bits() -> None:
    weight = torch.tensor([[-0.0, 3.0, -2.0], [5.0, -1.0, torch.tensor(1e-42)]])
    out, _ = masks.prune_rows(weight, torch.ones(3), torch.tensor([1]))
    assert out.tolist() == [[0.0, 3.0, -2.0], [5.0, -1.0, 0.0]]
    kept, _ = masks.prune_rows(weight, torch.ones(3), torch.tensor([0]))
    assert kept.view(torch.int32).equal(weight.view(torch.int32))
    assert masks.prune_rows(weight[:0], torch.ones(3), torch.tensor([1]))[0].shape == (0, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_told(bad: float) -> None:
    scores = torch.rand(3, 5)
    scores[1, 2] = bad
    assert not masks.prune_rows(torch.rand(3, 5), scores, torch.tensor([2]))[1]
    norm = torch.tensor([1.0, bad, 1.0])
    assert not masks.prune_rows(torch.ones(2, 3), norm, torch.tensor([1]))[1]


# -- importance of rows ------------------------------------------------------------------------

IMPORTANCE = st.lists(st.integers(-20, 20), min_size=5, max_size=5)


def by_matrix(
    count: int, importance: Tensor | None = None, of_inputs: Tensor | None = None
) -> Target:
    weighed = None if importance is None else Importance(importance, of_inputs)
    return Target(torch.tensor([count]), 0.5, comparison="matrix", importance=weighed)


def powers(exponents: list[int], rows: int) -> Tensor:
    """Importance that changes no bit of a score but its exponent."""
    return torch.tensor([2.0**k for k in exponents[:rows]])


@given(problems(), IMPORTANCE)
def test_rows_compete_by_their_importance(problem: tuple[Tensor, Tensor], drawn: list[int]) -> None:
    scores, count = problem[0].abs().double(), int(problem[1].sum())
    importance = powers(drawn, len(scores))
    weighed = [
        [c * x for x in row] for c, row in zip(importance.tolist(), scores.tolist(), strict=True)
    ]
    flat = slow_row([x for row in weighed for x in row], count)
    mask = mask_for(scores, by_matrix(count, importance))
    assert mask.flatten().tolist() == flat
    assert int(mask.sum()) == count


@given(problems(), IMPORTANCE, st.lists(st.integers(-20, 20), min_size=9, max_size=9))
def test_rows_and_inputs_compete_by_their_importance(
    problem: tuple[Tensor, Tensor], of_rows: list[int], of_inputs: list[int]
) -> None:
    scores, count = problem[0].abs().double(), int(problem[1].sum())
    rows, inputs = powers(of_rows, len(scores)), powers(of_inputs, scores.shape[1])
    weighed = [
        c * d * x
        for c, row in zip(rows.tolist(), scores.tolist(), strict=True)
        for d, x in zip(inputs.tolist(), row, strict=True)
    ]
    mask = mask_for(scores, by_matrix(count, rows, inputs))
    assert mask.flatten().tolist() == slow_row(weighed, count)
    # What is asked of a matrix is asked of its transpose; in other places ties fall otherwise.
    turned = mask_for(scores.T, by_matrix(count, inputs, rows)).T
    changed = mask ^ turned
    assert len((scores * rows[:, None] * inputs)[changed].unique()) <= 1


@given(problems())
def test_importance_of_ones_is_the_plain_matrix(problem: tuple[Tensor, Tensor]) -> None:
    scores, count = problem[0], int(problem[1].sum())
    ones = by_matrix(count, torch.ones(len(scores)), torch.ones(scores.shape[1]))
    assert mask_for(scores, ones).equal(mask_for(scores, by_matrix(count)))


@given(problems(), IMPORTANCE, st.integers(-30, 30))
def test_one_factor_for_all_importance_changes_nothing(
    problem: tuple[Tensor, Tensor], drawn: list[int], factor: int
) -> None:
    scores, count = problem[0].float(), int(problem[1].sum())
    importance = powers(drawn, len(scores))
    found = mask_for(scores, by_matrix(count, importance * 2.0**factor))
    assert found.equal(mask_for(scores, by_matrix(count, importance)))


@given(st.permutations(range(5)), st.integers(0, 35), st.integers(0, 100))
def test_rows_that_change_places_take_their_masks_along(
    order: list[int], count: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores, importance = torch.rand(5, 7, generator=rng), torch.rand(5, generator=rng) + 0.1
    mask = mask_for(scores, by_matrix(count, importance))
    assert mask_for(scores[order], by_matrix(count, importance[order])).equal(mask[order])


def test_importance_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    mask = mask_for(scores, by_matrix(3, torch.tensor([1.0, 10.0])))
    assert mask.int().tolist() == [[1, 1, 1], [0, 0, 0]]
    mask = mask_for(scores, by_matrix(3, torch.tensor([1.0, 1.6])))
    assert mask.int().tolist() == [[1, 1, 0], [1, 0, 0]]
    mask = mask_for(scores, by_matrix(3, torch.ones(2), torch.tensor([1.0, 1.0, 0.1])))
    assert mask.int().tolist() == [[1, 0, 1], [0, 0, 1]]
    mask = mask_for(scores, by_matrix(3, torch.tensor([1.0, 8.0]), torch.tensor([4.0, 1.0, 0.1])))
    assert mask.int().tolist() == [[0, 1, 1], [0, 0, 1]]


# Zeros that stay


def test_zeros_go_first_whatever_their_scores() -> None:
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0], [4.0, 3.0, 2.0, 1.0]])
    zeros = torch.tensor([[True, False, False, True], [False, False, False, False]])
    by_row = Target(torch.tensor([3, 1]), 0.5, zeros=zeros)
    assert mask_for(scores, by_row).int().tolist() == [[1, 1, 0, 1], [0, 0, 0, 1]]
    importance = Importance(torch.tensor([1.0, 0.1]))
    matrix = Target(torch.tensor([4]), 0.5, None, "matrix", importance=importance, zeros=zeros)
    assert mask_for(scores, matrix).int().tolist() == [[1, 0, 0, 1], [0, 0, 1, 1]]


def test_a_group_has_all_of_its_zeros() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]])
    zeros = torch.tensor([[False, True, True, True, False, False, False, True]])
    target = Target(torch.tensor([4]), 0.5, Pattern(2, 4), zeros=zeros)
    assert mask_for(scores, target).int().tolist() == [[0, 1, 1, 1, 1, 0, 0, 1]]
    other = Target(torch.tensor([2]), 0.5, Pattern(2, 4), zeros=zeros)  # of a slice: not its shape
    assert mask_for(scores[:, :4], other).int().tolist() == [[1, 1, 0, 0]]


def test_a_mask_without_the_zeros_gives_up_the_highest_scores_for_them() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False, False]])
    target = Target(torch.tensor([2]), 0.5, zeros=torch.tensor([[False, False, False, True]]))
    assert with_zeros(mask, scores, target).int().tolist() == [[1, 0, 0, 1]]
    paper = Target(torch.tensor([2]), 0.5, budget="paper", zeros=target.zeros)
    assert with_zeros(mask, scores, paper).int().tolist() == [[1, 1, 0, 1]]
    has = Target(torch.tensor([2]), 0.5, zeros=torch.tensor([[True, False, False, False]]))
    assert with_zeros(mask, scores, has) is mask
    assert with_zeros(mask, scores, Target(torch.tensor([2]), 0.5)) is mask
