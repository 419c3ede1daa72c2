"""Projection on a mean and rounding to largest remainders, against slow exact arithmetic."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import neuroal
from neuroal import NeuroalError
from neuroal.pruning.budget import HIGHEST, largest_remainder, project

below_one = st.floats(0, 1, exclude_max=True)


@st.composite
def projections(draw: st.DrawFn, most: int = 8) -> tuple[Tensor, Tensor, float]:
    n = draw(st.integers(1, most))
    ratios = draw(st.lists(st.floats(-0.5, 1.5), min_size=n, max_size=n))
    weights = draw(st.lists(st.integers(1, 10**6), min_size=n, max_size=n))
    return (
        torch.tensor(ratios, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
        draw(below_one),
    )


def weighted_mean(ratios: Tensor, weights: Tensor) -> float:
    pairs = zip(ratios.tolist(), weights.tolist(), strict=True)
    return float(sum(Fraction(r) * Fraction(w) for r, w in pairs) / int(weights.sum()))


@given(projections())
def test_projection_keeps_the_mean_and_the_bounds(case: tuple[Tensor, Tensor, float]) -> None:
    ratios, weights, mean = case
    result = project(ratios, weights, mean)
    assert weighted_mean(result, weights) == pytest.approx(mean, abs=1e-12)
    assert (result >= 0).all() and (result <= max(HIGHEST, mean)).all()


@given(projections())
def test_projection_keeps_the_order_and_shifts_by_one_constant(
    case: tuple[Tensor, Tensor, float],
) -> None:
    ratios, weights, mean = case
    result = project(ratios, weights, mean)
    inside = (result > 1e-9) & (result < max(HIGHEST, mean) - 1e-9)
    shifts = (result - ratios)[inside]
    assert len(shifts) == 0 or shifts.max() - shifts.min() < 1e-9
    order = ratios.argsort(stable=True)
    assert (result[order].diff() >= 0).all()


@given(projections(), st.data())
def test_projection_keeps_least_ratios(
    case: tuple[Tensor, Tensor, float], data: st.DataObject
) -> None:
    """What is above its least one is shifted by one constant; what is not would fall below it."""
    ratios, weights, mean = case
    least = [data.draw(st.floats(0, mean)) for _ in ratios]
    lowest = torch.tensor(least, dtype=torch.float64)
    result = project(ratios, weights, mean, lowest=lowest)
    assert weighted_mean(result, weights) == pytest.approx(mean, abs=1e-9)
    assert (result >= lowest).all() and (result <= max(HIGHEST, mean)).all()
    inside = (result > lowest + 1e-9) & (result < max(HIGHEST, mean) - 1e-9)
    shifts = (result - ratios)[inside]
    assert len(shifts) == 0 or shifts.max() - shifts.min() < 1e-9
    if len(shifts):
        held = (result <= lowest + 1e-9) & ~inside & (lowest < max(HIGHEST, mean) - 1e-9)
        assert bool((ratios + shifts[0] <= lowest + 1e-6)[held].all())


def test_least_ratios_by_hand() -> None:
    half = torch.full((4,), 0.5, dtype=torch.float64)
    lowest = torch.tensor([0.8, 0.0, 0.0, 0.0], dtype=torch.float64)
    result = project(half, torch.ones_like(half), 0.5, lowest=lowest)
    assert result.tolist() == pytest.approx([0.8, 0.4, 0.4, 0.4])
    full = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # above HIGHEST
    result = project(half, torch.ones_like(half), 0.5, lowest=full)
    assert result.tolist() == pytest.approx([1.0, 1 / 3, 1 / 3, 1 / 3])
    with pytest.raises(NeuroalError, match=r"mean 0\.1 is below that of the least ratios allowed"):
        project(half, torch.ones_like(half), 0.1, lowest=lowest)


def nearest(ratios: list[Fraction], weights: list[Fraction], mean: Fraction) -> list[Fraction]:
    """The nearest ratios in [0, highest] of a mean, by trying which of them lie on a bound."""
    highest = max(Fraction(HIGHEST), mean)
    best: tuple[Fraction, list[Fraction]] | None = None
    for bounds in product((None, Fraction(0), highest), repeat=len(ratios)):
        free = [i for i, bound in enumerate(bounds) if bound is None]
        fixed = sum(
            (w * b for w, b in zip(weights, bounds, strict=True) if b is not None),
            start=Fraction(0),
        )
        rest = mean * sum(weights) - fixed - sum(weights[i] * ratios[i] for i in free)
        if not free and rest:
            continue
        shift = rest / sum(weights[i] for i in free) if free else Fraction(0)
        result = [r + shift if b is None else b for r, b in zip(ratios, bounds, strict=True)]
        if min(result) < 0 or max(result) > highest:
            continue
        distance = sum(
            (w * (x - r) ** 2 for w, x, r in zip(weights, result, ratios, strict=True)),
            start=Fraction(0),
        )
        if best is None or distance < best[0]:
            best = distance, result
    assert best is not None
    return best[1]


@given(projections(most=4))
def test_projection_is_the_nearest_in_the_weighted_sense(
    case: tuple[Tensor, Tensor, float],
) -> None:
    ratios, weights, mean = case
    exact = [Fraction(r) for r in ratios.tolist()], [Fraction(w) for w in weights.tolist()]
    slow = nearest(*exact, Fraction(mean))
    result = project(ratios, weights, mean)
    assert result.tolist() == pytest.approx([float(x) for x in slow], abs=1e-9)


def test_projection_is_public() -> None:
    assert neuroal.project is project and neuroal.largest_remainder is largest_remainder


@pytest.mark.parametrize(
    ("ratios", "weights", "mean", "problem"),
    [
        ([0.5], [1.0, 1.0], 0.5, r"shapes \(1,\) and \(2,\), not \(n,\) both"),
        ([], [], 0.5, r"shapes \(0,\) and \(0,\)"),
        ([[0.5]], [[1.0]], 0.5, r"shapes \(1, 1\) and \(1, 1\)"),
        ([0.5, float("nan")], [1.0, 1.0], 0.5, "a ratio is not finite"),
        ([0.5, float("inf")], [1.0, 1.0], 0.5, "a ratio is not finite"),
        ([0.5, 0.5], [1.0, -1.0], 0.5, "weights are negative, or all 0"),
        ([0.5, 0.5], [0.0, 0.0], 0.5, "weights are negative, or all 0"),
        ([0.5, 0.5], [1.0, float("nan")], 0.5, "weights are negative, or all 0"),
        ([0.5, 0.5], [1.0, 1.0], 1.5, r"mean 1.5 is not in \[0, 1\]"),
        ([0.5, 0.5], [1.0, 1.0], float("nan"), r"mean nan is not in \[0, 1\]"),
    ],
)
def test_what_cannot_be_projected_is_refused(
    ratios: list[float], weights: list[float], mean: float, problem: str
) -> None:
    with pytest.raises(NeuroalError, match=problem):
        project(torch.tensor(ratios).double(), torch.tensor(weights).double(), mean)


def test_ratios_of_another_dtype_are_refused() -> None:
    with pytest.raises(NeuroalError, match=r"are torch\.float32 and torch\.float64, not float64"):
        project(torch.tensor([0.5]), torch.ones(1).double(), 0.5)


@given(projections())
def test_projection_is_idempotent(case: tuple[Tensor, Tensor, float]) -> None:
    ratios, weights, mean = case
    once = project(ratios, weights, mean)
    assert project(once, weights, mean) is once


def test_projection_returns_what_fits_itself() -> None:
    ratios = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert project(ratios, torch.tensor([3.0, 3.0]).double(), 0.5) is ratios


def test_projection_by_hand() -> None:
    # 0.9 + 0.2 is clipped to 0.99, so that the other two rise by 0.255 instead of 0.2.
    ratios = torch.tensor([0.9, 0.2, 0.3], dtype=torch.float64)
    result = project(ratios, torch.ones(3).double(), 2 / 3)
    assert result.tolist() == pytest.approx([0.99, 0.455, 0.555], abs=1e-9)


def test_projection_weighs() -> None:
    # Shift s: (3 (0.1 + s) + (0.5 + s)) / 4 = 0.4 gives s = 0.2.
    ratios = torch.tensor([0.1, 0.5], dtype=torch.float64)
    result = project(ratios, torch.tensor([3.0, 1.0]).double(), 0.4)
    assert result.tolist() == pytest.approx([0.3, 0.7], abs=1e-9)


def test_the_highest_ratio_gives_way_to_a_higher_sparsity() -> None:
    result = project(torch.tensor([0.0, 1.0]).double(), torch.ones(2).double(), 0.995)
    assert result.tolist() == pytest.approx([0.995, 0.995])


# -- largest remainder -----------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=12))
def test_largest_remainder_is_a_plain_sort(thousandths: list[int]) -> None:
    wanted = (sum(thousandths) + 500) // 1000
    shares = torch.tensor(thousandths, dtype=torch.float64) / 1000
    floors = [t // 1000 for t in thousandths]
    order = sorted(range(len(floors)), key=lambda i: (-(thousandths[i] % 1000), i))
    for i in order[: wanted - sum(floors)]:
        floors[i] += 1
    assert largest_remainder(shares, wanted).tolist() == floors


def test_the_first_of_equal_remainders_goes_up() -> None:
    shares = torch.tensor([1.5, 2.25, 0.5, 0.5], dtype=torch.float64)
    assert largest_remainder(shares, 5).tolist() == [2, 2, 1, 0]


def test_remainders_that_differ_by_rounding_are_equal() -> None:
    shares = torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64)
    assert largest_remainder(shares, 1).tolist() == [1, 0]


@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
)
def test_rows_of_shares_are_rounded_each_to_its_own_sum(
    counts: list[int], widths: list[int]
) -> None:
    total = sum(widths)
    shares = torch.tensor(counts).double()[:, None] * torch.tensor(widths) / total
    for count, rounded in zip(counts, largest_remainder(shares, torch.tensor(counts)), strict=True):
        slow = [count * w // total for w in widths]
        order = sorted(range(len(widths)), key=lambda k: (-(count * widths[k] % total), k))
        for k in order[: count - sum(slow)]:
            slow[k] += 1
        assert rounded.tolist() == slow and sum(slow) == count
