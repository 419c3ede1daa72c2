"""ROSE's order of the columns under SparseGPT, against a loop over slices and columns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuroal import Recipe, Statistics, Target, UsageError, testing
from neuroal.run.setup import setup
from neuroal_plugins.pruner.sparsegpt import SparseGPT, rose_order


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs whose loudness differs by column."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng)
    loudness = torch.randn(columns, generator=rng).exp()
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=rng) / 4
    x = torch.randn(4 * columns, columns, generator=rng) @ mix * loudness
    return weight, 2 * x.t() @ x


def matrix(count: int, ratio: float = 0.5, **more: Any) -> Target:
    return Target(torch.tensor([count]), ratio, comparison="matrix", **more)


def prune(pruner: SparseGPT, weight: Tensor, gram: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    [answer] = pruner.prune_linears(
        weight[None], [target], [Statistics({"gram": gram})], [testing.linear(*weight.shape)]
    )
    return answer.weight, answer.mask


def slow_order(weight: Tensor, norms: Tensor, count: int, width: int) -> list[int]:
    """The order of one linear whose weights compete in the matrix, slices sharing out evenly."""
    rows, columns = weight.shape
    w, n = weight.double().tolist(), norms.double().tolist()
    blocks = []
    for start in range(0, columns - width + 1, width):
        entries = [
            (abs(w[i][j]) * n[j], i, j) for i in range(rows) for j in range(start, start + width)
        ]
        lost = sorted(entries)[: count * width // columns]
        loss = {j: sum(s for s, _, k in lost if k == j) for j in range(start, start + width)}
        within = sorted(loss, key=lambda j: -loss[j])
        blocks.append((sum(loss.values()), within))
    totals = [total for total, _ in blocks]
    if not totals or max(totals) - min(totals) <= 0.5 * max(totals):
        return list(range(columns))
    moved = [j for _, within in sorted(blocks, key=lambda b: -b[0]) for j in within]
    return moved + list(range(len(moved), columns))


@given(data=st.data())
def test_the_order_is_that_of_the_loop(data: st.DataObject) -> None:
    width, slices = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    rows, extra = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 4)) % width
    columns = width * slices + extra
    share = data.draw(st.integers(0, rows))  # whole weights a column, so that slices share evenly
    problems = [problem(rows, columns, data.draw(st.integers(0, 99))) for _ in range(2)]
    weights = torch.stack([weight for weight, _ in problems])
    norms = torch.stack([gram.diagonal().sqrt() for _, gram in problems])
    orders = rose_order(weights, norms, [matrix(share * columns)] * 2, width)
    for order, weight, norm in zip(orders, weights, norms, strict=True):
        assert order.tolist() == slow_order(weight, norm, share * columns, width)


def test_an_order_worked_by_hand() -> None:
    # Slices of two, one weight of each pruned: losses (0, 1), (8, 0), (3, 0) and the rest.
    weight, norms = torch.tensor([[2.0, 1.0, 8.0, 9.0, 3.0, 4.0, 0.1]]), torch.ones(1, 7)
    target = matrix(3)
    assert rose_order(weight[None], norms, [target], 2).tolist() == [[2, 3, 4, 5, 1, 0, 6]]
    # Losses 6, 8 and 4: they differ by 4, half of the largest, so that nothing moves.
    weight = torch.tensor([[7.0, 6.0, 8.0, 9.0, 4.0, 5.0, 0.1]])
    assert rose_order(weight[None], norms, [target], 2).tolist() == [list(range(7))]


def columnar(columns: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A problem whose last columns lose most."""
    weight, gram = problem(8, columns, seed)
    loud = torch.linspace(0, 3, columns).exp()
    return weight, gram * loud * loud[:, None]


@pytest.mark.parametrize(
    "target",
    [
        matrix(96),
        matrix(96, budget="paper"),
        Target(torch.arange(8) + 8, 0.5),
        matrix(0, 0.0),
        matrix(192, 0.99),
    ],
    ids=["matrix", "paper", "row", "nothing", "everything"],
)
def test_it_is_sparsegpt_on_columns_in_that_order(target: Target) -> None:
    weight, gram = columnar()
    plugin = SparseGPT(slice=5, order="rose")
    order = rose_order(weight[None], gram.diagonal().sqrt()[None], [target], 5)[0]
    natural = torch.arange(24)
    assert order.sort().values.equal(natural)
    assert target.ratio == 0 or not order.equal(natural)
    found, mask = prune(plugin, weight, gram, target)
    moved, moved_mask = prune(SparseGPT(slice=5), weight[:, order], gram[order][:, order], target)
    assert found[:, order].equal(moved) and mask[:, order].equal(moved_mask)
    if target.budget == "exact":
        counts = mask.sum(1) if target.comparison == "row" else mask.sum().view(1)
        assert counts.equal(target.counts)


def test_the_columns_that_lose_most_are_made_up_for_by_the_others() -> None:
    errors = {"natural": 0.0, "rose": 0.0}
    for seed in range(5):
        weight, gram = columnar(64, seed)
        for order in errors:
            found, _ = prune(SparseGPT(slice=8, order=order), weight, gram, matrix(358, 0.7))  # type: ignore[arg-type]
            gap = (weight - found).double()
            errors[order] += float(((gap @ gram.double()) * gap).sum())
    assert errors["rose"] < 0.9 * errors["natural"]


def test_linears_side_by_side_have_orders_of_their_own() -> None:
    problems = [columnar(seed=0), problem(8, 24, 1), columnar(seed=2)]
    flat = torch.eye(24)  # shared, and of no order: neither is moved
    problems += [(problem(8, 24, seed)[0], flat) for seed in (3, 4)]
    plugin = SparseGPT(slice=6, order="rose")
    answers = plugin.prune_linears(
        torch.stack([weight for weight, _ in problems]),
        [matrix(96)] * 5,
        [Statistics({"gram": gram}) for _, gram in problems],
        [testing.linear(8, 24)] * 5,
    )
    for (weight, gram), answer in zip(problems, answers, strict=True):
        found, mask = prune(plugin, weight, gram, matrix(96))
        assert mask.equal(answer.mask) and torch.allclose(found, answer.weight, atol=1e-5)


def test_linears_without_columns_that_stand_out_are_pruned_as_ever() -> None:
    weight, gram = problem(8, 24)
    gram = torch.eye(24) + gram * 1e-4
    for width in (6, 128):
        natural, rose = SparseGPT(slice=width), SparseGPT(slice=width, order="rose")
        first, second = (prune(p, weight, gram, matrix(96)) for p in (natural, rose))
        assert first[0].equal(second[0]) and first[1].equal(second[1])


def test_dead_inputs_keep_the_exact_budget() -> None:
    weight, gram = columnar()
    dead = torch.arange(24) % 3 == 1
    gram = gram.masked_fill(dead | dead[:, None], 0)
    found, mask = prune(SparseGPT(slice=6, order="rose"), weight, gram, matrix(40))
    assert int(mask.sum()) == 40 and int((found == 0).sum()) == 40
    found, mask = prune(SparseGPT(slice=6, order="rose"), weight, torch.zeros(24, 24), matrix(40))
    assert int(mask.sum()) == 40 and found[~mask].equal(weight[~mask])


def test_a_pattern_is_refused() -> None:
    recipe = Recipe(pruner="sparsegpt", top_up="uniform", options={"sparsegpt": {"order": "rose"}})
    assert setup(recipe).pruner.instance.order == "rose"
    with pytest.raises(UsageError, match=r"sparsegpt.*N:M"):
        setup(replace(recipe, pattern="2:4", sparsity=None))
