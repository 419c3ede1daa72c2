"""SparseSwaps against loops that add up the whole error of every exchange, and its laws."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuroal import Importance, Pattern, Statistics, Target, testing
from neuroal_plugins.refiner import sparseswaps
from neuroal_plugins.refiner.sparseswaps import SparseSwaps


def problem(
    rows: int, columns: int, counts: list[int], seed: int = 0, tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a mask with `counts[i]` pruned at random in row i, and a correlated Gram matrix."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng)
    places = torch.rand(rows, columns, generator=rng).argsort(1).argsort(1)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=rng) / 2
    x = torch.randn(tokens or 4 * columns, columns, generator=rng) @ mix
    return weight, places < torch.tensor(counts)[:, None], 2 * x.t() @ x


def refine(
    weight: Tensor, mask: Tensor, gram: Tensor, pattern: Pattern | None = None, **options: Any
) -> Tensor:
    target = Target(mask.sum(1), float(mask.float().mean()), pattern)
    before = weight.clone(), mask.clone(), gram.clone()
    with torch.no_grad():
        refined = SparseSwaps(**options).refine_mask(
            weight, mask, target, Statistics({"gram": gram}), testing.linear(*weight.shape)
        )
    assert all(a.equal(b) for a, b in zip((weight, mask, gram), before, strict=True)), "written to"
    assert refined.dtype == torch.bool and refined.shape == mask.shape
    return refined


def errors(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """e H eᵀ of every row, float64 `(out,)`."""
    pruned = (weight * mask).double()
    return ((pruned @ gram.double()) * pruned).sum(1)


# The slow reference: one row, float64, every change by adding up the whole error twice.


def slow_error(w: np.ndarray, h: np.ndarray, mask: list[bool]) -> float:
    e = np.where(mask, w, 0.0)
    return float(e @ h @ e)


def flipped(mask: list[bool], *columns: int) -> list[bool]:
    return [gone != (j in columns) for j, gone in enumerate(mask)]


def slow_candidates(
    w: np.ndarray, h: np.ndarray, mask: list[bool], pruned: bool, limit: int
) -> list[int]:
    columns = [j for j, gone in enumerate(mask) if gone == pruned]
    alone = {j: slow_error(w, h, flipped(mask, j)) for j in columns}
    return sorted(columns, key=lambda j: alone[j])[: limit or None]


def slow_row(
    w: np.ndarray, h: np.ndarray, mask: list[bool], limit: int, swaps: int, of: int | None
) -> list[bool]:
    made, moved = 0, True
    while moved:
        moved = False
        kept, gone = (slow_candidates(w, h, mask, side, limit) for side in (False, True))
        for _ in range(sparseswaps.PER_PASS):
            pairs = [(u, p) for u, p in product(kept, gone) if of is None or u // of == p // of]
            if not pairs or made == swaps:
                break
            after = {pair: slow_error(w, h, flipped(mask, *pair)) for pair in pairs}
            u, p = min(pairs, key=lambda pair: after[pair])
            if after[u, p] >= slow_error(w, h, mask) * (1 - 1e-6):
                break
            mask, made, moved = flipped(mask, u, p), made + 1, True
            kept.remove(u)
            gone.remove(p)
    return mask


def slow_refine(
    weight: Tensor, mask: Tensor, gram: Tensor, limit: int, swaps: int, of: int | None = None
) -> Tensor:
    w, h = weight.double().numpy(), gram.double().numpy()
    rows = zip(w, mask.tolist(), strict=True)
    return torch.tensor([slow_row(row, h, gone, limit, swaps, of) for row, gone in rows])


# Against the reference.


@given(data=st.data())
def test_it_is_the_slow_loop(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    counts = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    limit, swaps = data.draw(st.sampled_from([0, 1, 3, 64])), data.draw(st.sampled_from([1, 2, 50]))
    weight, mask, gram = problem(rows, columns, counts, data.draw(st.integers(0, 99)))
    refined = refine(weight, mask, gram, candidates=limit, swaps=swaps)
    assert refined.equal(slow_refine(weight, mask, gram, limit, swaps))
    assert refined.sum(1).tolist() == counts


@given(data=st.data())
def test_under_a_pattern_it_is_the_slow_loop_within_groups(data: st.DataObject) -> None:
    of = data.draw(st.integers(1, 5))
    rows, columns = data.draw(st.integers(1, 3)), of * data.draw(st.integers(1, 4))
    pattern = Pattern(data.draw(st.integers(0, of)), of)
    seed, groups = data.draw(st.integers(0, 99)), rows * columns // of
    mask = problem(groups, of, [of - pattern.kept] * groups, seed)[1].reshape(rows, columns)
    weight, _, gram = problem(rows, columns, [0] * rows, seed)
    swaps = data.draw(st.sampled_from([1, 3, 50]))
    refined = refine(weight, mask, gram, pattern, swaps=swaps, candidates=1)
    assert refined.equal(slow_refine(weight, mask, gram, 0, swaps, of))
    assert (refined.reshape(-1, of).sum(1) == of - pattern.kept).all()


def test_candidates_are_chosen_again_after_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask, gram = problem(8, 14, [7] * 8, seed=3)
    for per_pass in (1, 2):
        monkeypatch.setattr(sparseswaps, "PER_PASS", per_pass)
        refined = refine(weight, mask, gram, candidates=3)
        assert refined.equal(slow_refine(weight, mask, gram, 3, 100))
    assert not refined.equal(refine(weight, mask, gram, candidates=3, swaps=2))


def test_exchanges_worked_by_hand() -> None:
    # H = [[2, 1, 0], [1, 2, 0], [0, 0, 1]], w = (1, -1, 1.5), weight 2 pruned: L = 2.25.
    # Pruning 0 or 1 in its place: L = 2, and the lower index of the two goes.
    gram = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.tensor([[1.0, -1.0, 1.5]])
    mask = torch.tensor([[False, False, True]])
    assert refine(weight, mask, gram).tolist() == [[True, False, False]]
    # Two pruned: {0, 2} has L = 2 + 2.25 and {1, 2} too; {0, 1} has 2 + 2 - 2, since both cancel.
    both = torch.tensor([[True, False, True]])
    assert refine(weight, both, gram).tolist() == [[True, True, False]]


# Laws.


def test_in_the_end_no_exchange_lowers_the_error() -> None:
    weight, mask, gram = problem(3, 16, [4, 8, 12], seed=5)
    refined = refine(weight, mask, gram, candidates=0)
    w, h = weight.double().numpy(), gram.double().numpy()
    for row, gone in zip(w, refined.tolist(), strict=True):
        best = slow_error(row, h, gone)
        for u, p in product(range(16), range(16)):
            if gone[p] and not gone[u]:
                assert slow_error(row, h, flipped(gone, u, p)) >= best * (1 - 1e-5)


@pytest.mark.parametrize("candidates", [0, 4, 64])
@pytest.mark.parametrize("tokens", [200, 12])  # 12: fewer than inputs, H has no full rank
def test_every_exchange_lowers_the_error(candidates: int, tokens: int) -> None:
    weight, mask, gram = problem(32, 48, list(range(8, 40)), seed=1, tokens=tokens)
    last, last_mask = errors(weight, mask, gram), mask
    for swaps in range(1, 16):
        refined = refine(weight, mask, gram, candidates=candidates, swaps=swaps)
        assert ((refined & ~mask).sum(1) <= swaps).all()
        now, changed = errors(weight, refined, gram), (refined != last_mask).any(1)
        assert (now[changed] < last[changed]).all() and now[~changed].equal(last[~changed])
        last, last_mask = now, refined
    assert float(last.sum()) < 0.7 * float(errors(weight, mask, gram).sum())


def test_more_candidates_find_better_masks() -> None:
    weight, mask, gram = problem(64, 96, [48] * 64, seed=2)
    totals = [
        float(errors(weight, refine(weight, mask, gram, candidates=limit), gram).sum())
        for limit in (1, 8, 0)
    ]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[2]


def test_rows_do_not_know_of_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask, gram = problem(20, 24, list(range(2, 22)), seed=4)
    whole = refine(weight, mask, gram)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert refine(weight[order], mask[order], gram).equal(whole[order])
    monkeypatch.setattr(sparseswaps, "AT_ONCE", 300)  # a row or two in one step
    assert refine(weight, mask, gram).equal(whole)


def test_the_order_of_inputs_does_not_matter() -> None:
    weight, mask, gram = problem(10, 24, [12] * 10, seed=6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    whole = refine(weight, mask, gram)
    assert refine(weight[:, order], mask[:, order], gram[order][:, order]).equal(whole[:, order])


def test_scale_does_not_matter() -> None:
    weight, mask, gram = problem(10, 24, [12] * 10, seed=7)
    whole = refine(weight, mask, gram)
    for factor in (2.0**-40, 2.0**40):
        assert refine(weight * factor, mask, gram).equal(whole)
        assert refine(weight, mask, gram * factor).equal(whole)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 7), (4, 7)])
def test_rows_without_a_pair_stay_as_they_are(shape: tuple[int, int]) -> None:
    for count in (0, shape[1]):
        weight, mask, gram = problem(*shape, [count] * shape[0])
        assert refine(weight, mask, gram).equal(mask)
        assert refine(weight, mask, gram, candidates=0).equal(mask)


def test_one_kept_weight_of_a_wide_row() -> None:
    weight, mask, gram = problem(6, 90, [89, 1, 0, 90, 45, 88], seed=8)
    refined = refine(weight, mask, gram, candidates=2)
    assert refined.equal(slow_refine(weight, mask, gram, 2, 100))


def test_equal_weights_of_equal_inputs_stay() -> None:
    mask = torch.arange(10).expand(3, 10) < torch.tensor([[4], [1], [9]])
    for gram in (torch.eye(10), torch.ones(10, 10), torch.zeros(10, 10)):
        assert refine(torch.ones(3, 10), mask, gram).equal(mask)


@given(data=st.data())
def test_ties_keep_counts_and_lower_the_error(data: st.DataObject) -> None:
    small = st.integers(-2, 2)
    x = torch.tensor(data.draw(st.lists(st.lists(small, min_size=6, max_size=6), min_size=1)))
    weight = torch.tensor([data.draw(st.lists(small, min_size=6, max_size=6)) for _ in range(2)])
    counts = data.draw(st.lists(st.integers(0, 6), min_size=2, max_size=2))
    mask = problem(2, 6, counts, data.draw(st.integers(0, 9)))[1]
    weight, gram = weight.float(), (x.t() @ x).float()
    refined = refine(weight, mask, gram)
    before, after = errors(weight, mask, gram), errors(weight, refined, gram)
    changed = (refined != mask).any(1)
    assert (after[changed] < before[changed]).all() and refined.sum(1).tolist() == counts
    assert refine(weight, mask, gram).equal(refined)


def test_weights_of_dead_inputs_go_first() -> None:
    weight, mask, gram = problem(4, 8, [3] * 4)
    dead = torch.isin(torch.arange(8), torch.tensor([1, 4, 5]))
    refined = refine(weight, mask, gram.masked_fill(dead | dead[:, None], 0))
    assert refined.equal(dead.expand(4, 8))


def test_importance_is_not_looked_at() -> None:
    """That of a row multiplies its error; that of inputs is about scores."""
    weight, mask, gram = problem(4, 8, [4] * 4)
    target = Target(mask.sum().view(1), 0.5, comparison="matrix")
    importance = Importance(torch.tensor([1, 0.1, 0.01, 0.5]), torch.ones(8) / 2)
    weighed = replace(target, importance=importance)
    known, linear = Statistics({"gram": gram}), testing.linear(4, 8)
    first, second = (
        SparseSwaps().refine_mask(weight, mask, x, known, linear) for x in (target, weighed)
    )
    assert first.equal(second) and first.equal(refine(weight, mask, gram))


def test_shrinkage_leads_from_all_of_h_to_its_diagonal() -> None:
    weight, mask, gram = problem(8, 24, [12] * 8)
    part = gram.clone()
    for i, j in product(range(24), range(24)):
        part[i, j] *= 1.0 if i == j else 0.25
    assert refine(weight, mask, gram, shrinkage=0.75).equal(refine(weight, mask, part))
    wanda = weight.abs() * gram.diagonal().sqrt()
    best = torch.zeros_like(mask).scatter(1, wanda.argsort(1)[:, :12], True)
    assert refine(weight, mask, gram, shrinkage=1.0).equal(best)
    assert refine(weight, best, gram, shrinkage=1.0).equal(best)
    assert not refine(weight, best, gram).equal(best)


def test_the_same_call_gives_the_same_bits() -> None:
    weight, mask, gram = problem(16, 64, list(range(16, 48, 2)))
    first = refine(weight, mask, gram)
    assert refine(weight, mask, gram.clone()).equal(first) and not first.equal(mask)


def test_no_exchanges_leave_the_mask() -> None:
    weight, mask, gram = problem(4, 8, [4] * 4)
    assert refine(weight, mask, gram, swaps=0).equal(mask)


@pytest.mark.parametrize("name", ["candidates", "swaps", "shrinkage"])
def test_an_option_out_of_range_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SparseSwaps(**{name: -1})


def test_required_statistics() -> None:
    assert SparseSwaps().required_statistics() == {"gram"}
