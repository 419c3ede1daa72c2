"""DSnoT against a loop over rows and cycles, and the laws that it keeps."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuroal import Linear, Pattern, Recipe, Statistics, Target, UsageError
from neuroal.run.setup import setup
from neuroal_plugins.refiner.dsnot import Dsnot, grow_list, prune_list

Lists = list[list[float]]


def linear(weight: Tensor, part: Any = "attention") -> Linear:
    rows, columns = weight.shape
    return Linear("model.layers.0.self_attn.q_proj", 0, rows, columns, 0, None, part)


def statistics(columns: int, seed: int = 0) -> Statistics:
    rng = torch.Generator().manual_seed(seed)
    return Statistics(
        {
            "input_norm": torch.rand(columns, generator=rng) * 3 + 0.1,
            "input_sum": torch.randn(columns, generator=rng),
            "input_var": torch.rand(columns, generator=rng) + 0.05,
        }
    )


def problem(rows: int, columns: int, counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and a mask with `counts[i]` pruned at random in row i."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng)
    places = torch.rand(rows, columns, generator=rng).argsort(1).argsort(1)
    return weight, places < torch.tensor(counts)[:, None]


def refine(
    plugin: Dsnot,
    weight: Tensor,
    mask: Tensor,
    stats: Statistics,
    budget: Any = "exact",
    pattern: Pattern | None = None,
    part: Any = "attention",
) -> Tensor:
    target = Target(mask.sum(1), float(mask.float().mean()), pattern, budget=budget)
    before = weight.clone(), mask.clone()
    with torch.no_grad():
        refined = plugin.refine_mask(weight, mask, target, stats, linear(weight, part))
    assert weight.equal(before[0]) and mask.equal(before[1])
    assert refined.dtype == torch.bool and refined.shape == mask.shape
    return refined


# The slow reference: one row, one cycle at a time, lists of Python numbers.


def slow_lists(
    c: list[float], wanda: list[float], v: list[float], mask: list[bool], gamma: float
) -> tuple[list[int], list[int]]:
    def grow_key(j: int) -> float:
        if not mask[j] or c[j] == 0:
            return 0.0
        return c[j] / v[j] ** gamma if v[j] ** gamma > 0 else math.copysign(math.inf, c[j])

    columns = range(len(c))
    grow = sorted(columns, key=grow_key)
    kept = sorted((j for j in columns if not mask[j]), key=lambda j: wanda[j])
    negative, zero = [j for j in kept if c[j] < 0], [j for j in kept if c[j] == 0]
    positive = [j for j in kept if c[j] > 0]
    return grow, negative + zero + positive[::-1]


class SlowRow:
    def __init__(self, c: Any, wanda: Any, v: Any, mask: Any, plugin: Dsnot) -> None:
        self.c, self.mask, self.first, self.plugin = c, list(mask), list(mask), plugin
        self.wanda = wanda
        self.grow, self.prune = slow_lists(c, wanda, v, mask, plugin.gamma)
        self.g, self.p = [0, len(self.grow) - 1], [0, len(self.prune) - 1]
        self.error = sum(x for x, gone in zip(c, mask, strict=True) if gone)
        self.active = True

    def cycle(self) -> None:
        self.active = self.active and abs(self.error) > self.plugin.threshold
        up, down = self.error > 0, self.error < 0
        g, p = self.g[up], self.p[down]
        self.g[up] += -1 if up else 1
        self.p[down] += -1 if down else 1
        inside = 0 <= p < len(self.prune) and 0 <= g < len(self.grow)
        if self.plugin.published_code:
            self.active = self.active and inside
            if inside:
                self.mask[self.prune[p]] = self.active
                self.mask[self.grow[g]] = not self.active
        elif self.active:
            self.active = inside and self.first[self.grow[g]]
            # an entry that has been exchanged from the other end
            self.active = self.active and self.mask[self.grow[g]] and not self.mask[self.prune[p]]
            if self.active:
                self.mask[self.prune[p]], self.mask[self.grow[g]] = True, False
        if self.active:
            self.error += self.c[self.prune[p]] - self.c[self.grow[g]]

    def cycle_in_group(self, of: int) -> None:
        self.active = self.active and abs(self.error) > self.plugin.threshold
        if not self.active:
            return
        up = self.error > 0
        g = self.g[up]
        self.g[up] += -1 if up else 1
        self.active = 0 <= g < len(self.grow) and self.first[self.grow[g]]
        self.active = self.active and self.mask[self.grow[g]]
        if not self.active:
            return
        grown = self.grow[g]
        start = grown - grown % of
        free = [j for j in range(start, start + of) if not self.first[j] and not self.mask[j]]
        if free:
            pruned = min(free, key=lambda j: self.wanda[j])
            self.mask[pruned], self.mask[grown] = True, False
            self.error += self.c[pruned] - self.c[grown]


def slow_refine(
    plugin: Dsnot, weight: Tensor, mask: Tensor, stats: Statistics, of: int | None = None
) -> Tensor:
    c: Lists = (weight * stats.input_sum).tolist()
    wanda: Lists = (weight.abs() * stats.input_norm).tolist()
    v = stats.input_var.tolist()
    rows = [SlowRow(c[i], wanda[i], v, mask[i].tolist(), plugin) for i in range(len(c))]
    for _ in range(plugin.cycles):
        if not any(row.active for row in rows):
            break
        for row in rows:
            row.cycle() if of is None else row.cycle_in_group(of)
    return torch.tensor([row.mask for row in rows])


# Against the reference.


@given(data=st.data())
def test_it_is_the_slow_loop(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 24))
    counts = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    seed = data.draw(st.integers(0, 99))
    published = data.draw(st.booleans())
    plugin = Dsnot(
        gamma=data.draw(st.sampled_from([0.0, 1.0, 2.0])),
        cycles=data.draw(st.sampled_from([0, 1, 7, 50])),
        threshold=data.draw(st.sampled_from([0.0, 0.1, 2.0])),
        published_code=published,
    )
    weight, mask = problem(rows, columns, counts, seed)
    stats = statistics(columns, seed)
    refined = refine(plugin, weight, mask, stats, "paper" if published else "exact")
    assert refined.equal(slow_refine(plugin, weight, mask, stats))
    if not published:
        assert refined.sum(1).tolist() == counts


@given(data=st.data())
def test_under_a_pattern_it_is_the_slow_loop_within_groups(data: st.DataObject) -> None:
    of = data.draw(st.integers(1, 5))
    rows, columns = data.draw(st.integers(1, 4)), of * data.draw(st.integers(1, 5))
    pattern = Pattern(data.draw(st.integers(0, of)), of)
    seed = data.draw(st.integers(0, 99))
    groups = rows * columns // of
    weight, mask = problem(groups, of, [of - pattern.kept] * groups, seed)
    weight, mask = weight.reshape(rows, columns), mask.reshape(rows, columns)
    stats = statistics(columns, seed)
    for published in (False, True):
        plugin = Dsnot(published_code=published, threshold=data.draw(st.sampled_from([0.0, 0.1])))
        refined = refine(plugin, weight, mask, stats, "paper" if published else "exact", pattern)
        assert refined.equal(slow_refine(plugin, weight, mask, stats, of))
        assert (refined.reshape(-1, of).sum(1) == of - pattern.kept).all()


def test_one_exchange_worked_by_hand() -> None:
    # C = (2, -1, 0.5, 3, -0.2) with weights 0, 1 and 2 pruned: error 1.5 > 0, so the pruned weight
    # of largest C / v grows: 2/4, 0.5/0.5 = 1 -> weight 2; the kept weight of negative C and least
    # Wanda score goes: weight 4. Error 1.5 - 0.2 - 0.5 = 0.8, and no negative kept weight is left:
    # the next exchange grows 0 (2/4) and prunes the positive weight 3. Error 0.8 + 3 - 2 = 1.8.
    weight = torch.tensor([[2.0, -1.0, 0.5, 3.0, -0.2]])
    mask = torch.tensor([[True, True, True, False, False]])
    stats = Statistics(
        {
            "input_norm": torch.ones(5),
            "input_sum": torch.ones(5),
            "input_var": torch.tensor([4.0, 1.0, 0.5, 1.0, 1.0]),
        }
    )
    for cycles, expected in (
        (1, [True, True, False, False, True]),
        (2, [False, True, False, True, True]),
        (9, [False, True, False, True, True]),
    ):
        assert refine(Dsnot(cycles=cycles), weight, mask, stats).tolist() == [expected]


def test_the_grow_list_ends_in_pruned_weights_and_counts_kept_ones_as_0() -> None:
    criterion = torch.tensor([[3.0, -4.0, 2.0, 0.0, 5.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    variance = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0])
    assert grow_list(criterion, mask, variance, 1.0).tolist() == [[1, 3, 4, 0, 2]]


def test_the_prune_list_has_negatives_ascending_then_positives_descending() -> None:
    criterion = torch.tensor([[1.0, -1.0, 1.0, 0.0, -1.0, -1.0]])
    wanda = torch.tensor([[1.0, 5.0, 4.0, 0.5, 3.0, 0.1]])
    mask = torch.tensor([[False, False, False, False, False, True]])
    assert prune_list(criterion, wanda, mask).tolist() == [[4, 1, 3, 2, 0, 5]]


# Laws.


def test_only_the_attention_is_refined_unless_asked() -> None:
    weight, mask = problem(6, 40, [20] * 6)
    stats = statistics(40)
    assert not refine(Dsnot(), weight, mask, stats).equal(mask)
    assert refine(Dsnot(), weight, mask, stats, part="mlp").equal(mask)
    everywhere = Dsnot(attention_only=False)
    assert refine(everywhere, weight, mask, stats, part="mlp").equal(
        refine(Dsnot(), weight, mask, stats)
    )


def test_the_error_of_a_row_falls() -> None:
    weight, mask = problem(64, 128, [64] * 64)
    stats = statistics(128)
    refined = refine(Dsnot(), weight, mask, stats)
    criterion = weight * stats.input_sum
    before, after = ((criterion * m).sum(1).abs() for m in (mask, refined))
    assert float(after.mean()) < 0.2 * float(before.mean())


def test_the_published_code_drifts_to_more_pruned_weights_and_the_default_does_not() -> None:
    weight, mask = problem(64, 120, [60] * 64)
    stats = statistics(120)
    published = refine(Dsnot(published_code=True), weight, mask, stats, "paper")
    assert int(published.sum()) > int(mask.sum())
    assert refine(Dsnot(), weight, mask, stats, "paper").sum(1).equal(mask.sum(1))


def test_the_published_code_is_refused_under_the_exact_budget() -> None:
    options = {"dsnot": {"published_code": True}}
    recipe = Recipe(refiner="dsnot", top_up="neuroal", options=options)
    with pytest.raises(UsageError, match=r"--budget paper: dsnot\.published_code"):
        setup(recipe)
    assert setup(replace(recipe, budget="paper")).refiner is not None
    assert setup(replace(recipe, options={})).refiner is not None


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("silent", [slice(0, 3), slice(None)])
def test_constant_and_silent_inputs_do_not_break_it(published: bool, silent: slice) -> None:
    weight, mask = problem(4, 12, [6] * 4)
    stats = statistics(12).tensors()
    stats["input_var"][silent] = 0
    stats["input_sum"][:2] = 0
    plugin = Dsnot(published_code=published, threshold=0.0)
    refined = refine(plugin, weight, mask, Statistics(stats), "paper")
    assert refined.equal(slow_refine(plugin, weight, mask, Statistics(stats)))


def test_equal_weights_keep_the_count() -> None:
    weight, mask = torch.ones(3, 10), torch.arange(10).expand(3, 10) < 4
    ones = Statistics({n: torch.ones(10) for n in ("input_norm", "input_sum", "input_var")})
    refined = refine(Dsnot(), weight, mask, ones)
    assert refined.sum(1).tolist() == [4, 4, 4]


def test_the_same_call_gives_the_same_bits() -> None:
    weight, mask = problem(16, 64, list(range(16, 48, 2)))
    first = refine(Dsnot(), weight, mask, statistics(64))
    assert refine(Dsnot(), weight, mask, statistics(64)).equal(first)


@pytest.mark.parametrize("name", ["gamma", "cycles", "threshold"])
def test_an_option_out_of_range_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Dsnot(**{name: -1})


def test_required_statistics() -> None:
    assert Dsnot().required_statistics() == {"input_norm", "input_sum", "input_var"}
