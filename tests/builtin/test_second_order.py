"""SparseGPT, ADMM and ALPS against slow formulas of their own, and the laws that all three keep."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import neuroal
from neuroal import Importance, Linear, NeuroalError, Pattern, Statistics, Target, testing
from neuroal.layout import find
from neuroal.plugins import load
from neuroal.pruning.hooks import update
from neuroal_plugins import second_order
from neuroal_plugins.pruner.admm import Admm
from neuroal_plugins.pruner.alps import Alps, solve_on_support
from neuroal_plugins.pruner.sparsegpt import FadingNorm, SparseGPT

PRUNERS = [SparseGPT(), SparseGPT(slice=5), Admm(), Alps()]
each_pruner = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: type(p).__name__)


def linear(weight: Tensor) -> Linear:
    return testing.linear(*weight.shape, name="model.layers.3.mlp.up_proj", block=3, group=2)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a Gram matrix of correlated inputs whose spectrum falls as a power law."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng)
    mixing = torch.linalg.qr(torch.randn(columns, columns, generator=rng)).Q
    scale = torch.arange(1, columns + 1).float() ** -0.75
    x = torch.randn(8 * columns, columns, generator=rng) * scale @ mixing
    return weight, 2 * x.t() @ x


def matrix(count: int, ratio: float = 0.5, **more: Any) -> Target:
    return Target(torch.tensor([count]), ratio, comparison="matrix", **more)


def prune(pruner: Any, weight: Tensor, gram: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    before = weight.clone(), gram.clone(), target.counts.clone()
    with torch.no_grad():
        [result] = pruner.prune_linears(
            weight[None], [target], [Statistics({"gram": gram})], [linear(weight)]
        )
    assert all(a.equal(b) for a, b in zip((weight, gram, target.counts), before, strict=True)), (
        "an input was written to"
    )
    assert result.weight.dtype == torch.float32 and result.mask.dtype == torch.bool
    assert result.weight.isfinite().all() and not result.weight[result.mask].any()
    return result.weight, result.mask


def output_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    gap, dense, gram = (weight - pruned).double(), weight.double(), gram.double()
    return float(torch.trace(gap @ gram @ gap.t()) / torch.trace(dense @ gram @ dense.t()))


# Slow references: float64, plain loops, nothing of the code under test.


def slow_smallest(scores: np.ndarray, count: int) -> set[tuple[int, int]]:
    order = sorted((scores[i, j], i, j) for i, j in np.ndindex(*scores.shape))
    return {(i, j) for _, i, j in order[:count]}


def slow_sparsegpt(
    weight: Tensor, gram: Tensor, choose: Any, slices: list[range]
) -> tuple[np.ndarray, np.ndarray]:
    """Optimal brain surgery, column by column, with a fresh inverse of what is still to come."""
    w, h = weight.double().numpy().copy(), gram.double().numpy().copy()
    h += 0.01 * np.diag(h).mean() * np.eye(len(h))
    mask = np.zeros(w.shape, dtype=bool)
    for columns in slices:
        saliency = np.zeros(w.shape)
        for j in columns:
            saliency[:, j] = w[:, j] ** 2 / np.linalg.inv(h[j:, j:])[0, 0]
        for i, j in choose(saliency[:, columns.start : columns.stop]):
            mask[i, columns.start + j] = True
        for j in columns:
            inverse = np.linalg.inv(h[j:, j:])
            for i in range(w.shape[0]):
                if mask[i, j]:
                    w[i, j:] -= w[i, j] / inverse[0, 0] * inverse[0]
    return w, mask


def slow_admm(weight: Tensor, gram: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    w0, h = weight.double().numpy(), gram.double().numpy()
    norm = np.sqrt(np.diag(h)) + 1e-8
    h = h / np.outer(norm, norm)
    h = h + 0.1 * np.diag(h).mean() * np.eye(len(h))
    w0 = w0 * norm
    w, u = w0.copy(), np.zeros_like(w0)
    gone: set[tuple[int, int]] = set()
    for t in range(1, 21):
        if t <= 15:
            now = int(np.floor(count * (1 - (1 - t / 15) ** 3)))
            gone = slow_smallest(np.abs(w + u), now)
        z = w + u
        for i, j in gone:
            z[i, j] = 0
        u = u + w - z
        right = h @ w0.T + 1.0 * (z - u).T
        w = np.linalg.solve(h + np.eye(len(h)), right).T
    z = w + u
    for i, j in gone:
        z[i, j] = 0
    return z / norm, z == 0


def slow_alps_mask(weight: Tensor, gram: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The support that ADMM finds and, on it, the least-squares weights themselves."""
    w0, h = weight.double().numpy(), gram.double().numpy()
    h = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
    norm = np.sqrt(np.diag(h)) + 1e-8
    h, w0 = h / np.outer(norm, norm), w0 * norm
    kept, rho = w0.size - count, 0.1
    gone = before = slow_smallest(np.abs(w0), count)
    d, v = w0.copy(), np.zeros_like(w0)
    for i, j in gone:
        d[i, j] = 0
    for t in range(1, 301):
        w = np.linalg.solve(h + rho * np.eye(len(h)), (w0 @ h - v + rho * d).T).T
        d = w + v / rho
        gone = slow_smallest(np.abs(d), count)
        for i, j in gone:
            d[i, j] = 0
        v = v + rho * (w - d)
        if t % 3 == 0:
            changed = len(gone ^ before)
            if changed == 0:
                break
            share = changed / kept
            rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
            before = gone
    out, mask = np.zeros_like(w0), np.zeros(w0.shape, dtype=bool)
    for i, j in gone:
        mask[i, j] = True
    for i in range(len(w0)):
        s = np.flatnonzero(~mask[i])
        out[i, s] = np.linalg.solve(h[np.ix_(s, s)], (h @ w0[i])[s])
    return out / norm, mask


def close(found: Tensor, expected: np.ndarray) -> bool:
    return np.allclose(found.numpy(), expected, rtol=2e-3, atol=2e-3)


# Each method against its slow formula.


@pytest.mark.parametrize("seed", range(4))
def test_sparsegpt_is_optimal_brain_surgery(seed: int) -> None:
    weight, gram = problem(4, 12, seed)
    slices = [range(0, 5), range(5, 10), range(10, 12)]
    # 29 * (5, 5, 2) / 12 = 12.08, 12.08, 4.83: the last slice takes the one left over
    counts = {5: 12, 2: 5}
    expected, mask = slow_sparsegpt(
        weight, gram, lambda s: slow_smallest(s, counts[s.shape[1]]), slices
    )
    found, found_mask = prune(SparseGPT(slice=5), weight, gram, matrix(29))
    assert (found_mask.numpy() == mask).all()
    assert close(found, expected)


def test_sparsegpt_prunes_one_more_a_slice_under_the_paper_budget() -> None:
    weight, gram = problem(4, 12)
    slices = [range(0, 5), range(5, 10), range(10, 12)]
    expected, mask = slow_sparsegpt(
        weight, gram, lambda s: slow_smallest(s, int(0.6 * s.size) + 1), slices
    )
    target = matrix(28, 0.6, budget="paper")
    found, found_mask = prune(SparseGPT(slice=5), weight, gram, target)
    assert (found_mask.numpy() == mask).all() and int(found_mask.sum()) == 13 + 13 + 5
    assert close(found, expected)


def test_sparsegpt_compares_rows_when_asked() -> None:
    weight, gram = problem(3, 10)
    counts = [0, 5, 9]  # a slice of 5 gets half; of the odd one out the first slice takes it
    shares = {0: [0, 3, 5], 5: [0, 2, 4]}
    start = iter((0, 5))

    def choose(saliency: np.ndarray) -> set[tuple[int, int]]:
        share = shares[next(start)]
        return {(i, j) for i in range(3) for _, j in slow_smallest(saliency[i : i + 1], share[i])}

    expected, mask = slow_sparsegpt(weight, gram, choose, [range(0, 5), range(5, 10)])
    found, found_mask = prune(SparseGPT(slice=5), weight, gram, Target(torch.tensor(counts), 0.5))
    assert (found_mask.numpy() == mask).all() and found_mask.sum(1).tolist() == counts
    assert close(found, expected)


@pytest.mark.parametrize("width", [1, 4, 6, 128])
def test_sparsegpt_chooses_a_pattern_from_the_updated_weights_of_each_group(width: int) -> None:
    weight, gram = problem(4, 12)

    def choose(saliency: np.ndarray) -> set[tuple[int, int]]:
        return {(i, j) for i in range(4) for _, j in slow_smallest(saliency[i : i + 1], 1)}

    groups = [range(j, j + 3) for j in range(0, 12, 3)]
    expected, mask = slow_sparsegpt(weight, gram, choose, groups)
    target = matrix(16, 1 / 3, pattern=Pattern(2, 3))
    found, found_mask = prune(SparseGPT(slice=width), weight, gram, target)
    assert (found_mask.numpy() == mask).all()
    assert close(found, expected)


def test_sparsegpt_scores_by_the_static_saliency() -> None:
    weight, gram = problem(4, 12)
    h = gram.double().numpy()
    h = h + 0.01 * np.diag(h).mean() * np.eye(12)
    scores = SparseGPT().score_weights(weight, Statistics({"gram": gram}), linear(weight))
    for j in range(12):
        saliency = weight[:, j].double().numpy() ** 2 / np.linalg.inv(h[j:, j:])[0, 0]
        np.testing.assert_allclose(scores[:, j].numpy(), saliency, rtol=1e-3)


@pytest.mark.parametrize(("pruner", "damping"), [(Admm(), 0.0), (Alps(), 0.01)])
def test_admm_and_alps_score_by_the_norm_of_the_input(pruner: Any, damping: float) -> None:
    weight, gram = problem(4, 12)
    scores = pruner.score_weights(weight, Statistics({"gram": gram}), linear(weight))
    mean = sum(float(gram[j, j]) for j in range(12)) / 12
    for i, j in np.ndindex(4, 12):
        expected = abs(float(weight[i, j])) * (float(gram[j, j]) + damping * mean) ** 0.5
        assert float(scores[i, j]) == pytest.approx(expected, rel=1e-4)


def test_sparsegpt_worked_by_hand() -> None:
    # Undamped H = [[2, 1], [1, 2]]: H⁻¹ = [[2, -1], [-1, 2]] / 3, U_00² = 2/3, U_11² = 1/2.
    # Scores of (1, 2): 1.5 and 8. Pruning the first: w_1 += 1 * (1/3) / (2/3) = 0.5.
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found, mask = prune(SparseGPT(damping=0), torch.tensor([[1.0, 2.0]]), gram, matrix(1))
    assert mask.tolist() == [[True, False]]
    assert torch.allclose(found, torch.tensor([[0.0, 2.5]]))


@pytest.mark.parametrize("seed", range(4))
def test_admm_is_the_slow_loop(seed: int) -> None:
    weight, gram = problem(4, 10, seed)
    expected, mask = slow_admm(weight, gram, 23)
    found, found_mask = prune(Admm(), weight, gram, matrix(23))
    assert (found_mask.numpy() == mask).all()
    assert close(found, expected)


@pytest.mark.parametrize("seed", range(4))
def test_alps_is_the_slow_loop_and_then_least_squares(seed: int) -> None:
    weight, gram = problem(4, 10, seed)
    expected, mask = slow_alps_mask(weight, gram, 23)
    found, found_mask = prune(Alps(gradient_steps=40), weight, gram, matrix(23))
    assert (found_mask.numpy() == mask).all()
    assert close(found, expected)
    early, early_mask = prune(Alps(gradient_steps=0), weight, gram, matrix(23))
    assert early_mask.equal(found_mask)
    errors = [output_error(weight, w, gram) for w in (found, early)]
    assert errors[0] <= errors[1]


def test_conjugate_gradients_solve_as_many_unknowns_as_steps() -> None:
    weight, gram = problem(5, 6)
    norm = gram.diagonal().sqrt()
    h = gram / norm / norm[:, None]
    mask = torch.rand(5, 6) < torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0])[:, None]
    found = solve_on_support(torch.zeros(1, 5, 6), weight[None] @ h, h[None], mask[None], 12)[0]
    for i in range(5):
        s = (~mask[i]).nonzero().flatten()
        exact = torch.linalg.solve(h[s][:, s], (weight @ h)[i, s])
        assert torch.allclose(found[i, s], exact, atol=1e-3)
        assert not found[i, mask[i]].any()


# Laws.


@each_pruner
@given(data=st.data())
def test_every_target_is_met_exactly(pruner: Any, data: st.DataObject) -> None:
    rows, groups = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    columns, seed = 4 * groups, data.draw(st.integers(0, 99))
    weight, gram = problem(rows, columns, seed)
    kind = data.draw(st.sampled_from(["matrix", "row", "pattern"]))
    if kind == "matrix":
        count = data.draw(st.integers(0, rows * columns))
        _, mask = prune(pruner, weight, gram, matrix(count))
        assert int(mask.sum()) == count
    elif kind == "row":
        counts = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
        _, mask = prune(pruner, weight, gram, Target(torch.tensor(counts), 0.5))
        assert mask.sum(1).tolist() == counts
    else:
        pattern = Pattern(data.draw(st.integers(0, 4)), 4)
        target = matrix(rows * groups * (4 - pattern.kept), pattern=pattern)
        _, mask = prune(pruner, weight, gram, target)
        assert (mask.reshape(-1, 4).sum(1) == 4 - pattern.kept).all()


@each_pruner
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 8)])
def test_ratio_0_leaves_the_weight_and_1_leaves_none(pruner: Any, shape: tuple[int, int]) -> None:
    weight, gram = problem(*shape)
    size = weight.numel()
    for count in (0, 1, size - 1, size):
        found, mask = prune(pruner, weight, gram, matrix(count, count / (size + 1)))
        assert int(mask.sum()) == count
        assert count > 0 or found.equal(weight)


@pytest.mark.parametrize("pruner", [SparseGPT(), Admm()], ids=lambda p: type(p).__name__)
def test_weights_of_dead_inputs_go_first(pruner: Any) -> None:
    weight, gram, dead = dead_inputs()
    _, mask = prune(pruner, weight, gram, Target(torch.full((4,), 3), 3 / 8))
    assert mask.equal(dead.expand_as(mask))
    _, mask = prune(pruner, weight, gram, matrix(5, 5 / 32))
    assert int(mask.sum()) == 5 and not mask[:, ~dead].any()


@each_pruner
def test_dead_inputs_keep_the_exact_budget_and_their_kept_weights(pruner: Any) -> None:
    weight, gram, dead = dead_inputs()
    found, mask = prune(pruner, weight, gram, matrix(5, 5 / 32))
    assert int((found == 0).sum()) == 5
    stays = dead & ~mask
    assert torch.allclose(found[stays], weight[stays], atol=1e-5)


def dead_inputs() -> tuple[Tensor, Tensor, Tensor]:
    weight, gram = problem(4, 8)
    dead = torch.zeros(8, dtype=torch.bool)
    dead[[1, 4, 5]] = True
    return weight, gram.masked_fill(dead | dead[:, None], 0), dead


def test_sparsegpt_zeroes_dead_inputs_under_the_paper_budget() -> None:
    weight, gram = problem(4, 8)
    gram[2] = gram[:, 2] = 0
    found, _ = prune(SparseGPT(), weight, gram, matrix(1, 0.01, budget="paper"))
    assert not found[:, 2].any() and found[:, 3].any()


@each_pruner
def test_all_inputs_dead(pruner: Any) -> None:
    weight, gram = problem(4, 8)
    found, mask = prune(pruner, weight, torch.zeros_like(gram), matrix(16))
    assert int(mask.sum()) == 16
    assert torch.allclose(found[~mask], weight[~mask])


@each_pruner
def test_equal_weights_and_uncorrelated_inputs_still_give_the_exact_count(pruner: Any) -> None:
    weight, gram = torch.ones(4, 8), torch.eye(8)
    found, mask = prune(pruner, weight, gram, matrix(13))
    assert int(mask.sum()) == 13
    assert torch.allclose(found[~mask], torch.ones(19), atol=1e-2)
    zeros, mask = prune(pruner, torch.zeros(4, 8), gram, matrix(13))
    assert int(mask.sum()) == 13 and not zeros.any()


@each_pruner
def test_the_same_call_gives_the_same_bits(pruner: Any) -> None:
    weight, gram = problem(6, 16)
    first = prune(pruner, weight, gram, matrix(50))
    other = problem(6, 16, seed=1)
    prune(pruner, *other, matrix(50))
    again = prune(pruner, weight, gram.clone(), matrix(50))
    assert first[0].equal(again[0]) and first[1].equal(again[1])


@each_pruner
def test_traits(pruner: Any) -> None:
    traits = pruner.describe()
    assert traits.comparison == "matrix"
    assert traits.patterns and not traits.row_ratios
    assert pruner.required_statistics() == {"gram"}


@pytest.mark.parametrize(
    ("plugin", "options"),
    [
        (SparseGPT, {"damping": -0.1}),
        (SparseGPT, {"slice": 0}),
        (Admm, {"damping": 2.0}),
        (Admm, {"rho": 0.0}),
        (Admm, {"ramp": 21}),
        (Alps, {"rho": -1.0}),
        (Alps, {"iterations": 0}),
        (Alps, {"gradient_steps": -1}),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(plugin: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        plugin(**options)


# Layer-wise error: ALPS <= ADMM <= SparseGPT < Wanda.


def wanda(weight: Tensor, gram: Tensor, ratio: float) -> Tensor:
    scores = weight.abs() * gram.diagonal().sqrt()
    count = int(weight.shape[1] * ratio)
    return weight.scatter(1, scores.argsort(1)[:, :count], 0.0)


def mean_errors(problems: list[tuple[Tensor, Tensor]], ratio: float) -> list[float]:
    rows = []
    for weight, gram in problems:
        target = matrix(round(weight.numel() * ratio), ratio)
        found = [prune(p, weight, gram, target)[0] for p in (Alps(), Admm(), SparseGPT())]
        found.append(wanda(weight, gram, ratio))
        rows.append([output_error(weight, w, gram) for w in found])
    return np.mean(rows, axis=0).tolist()


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_the_better_the_method_the_smaller_the_output_error(ratio: float) -> None:
    alps, admm, sparsegpt, plain = mean_errors([problem(48, 64, seed) for seed in range(5)], ratio)
    assert alps <= admm <= sparsegpt < plain
    assert sparsegpt < 0.8 * plain


def hidden_activations(folder: Path, model_name: str) -> list[tuple[Tensor, Tensor]]:
    """Weight and Gram matrix of every linear of the first and last block of a shared model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder / "models" / model_name, dtype=torch.float32
    )
    lines = (folder / "reference/llama.calibration.jsonl").read_text().splitlines()[:8]
    grams: dict[str, Tensor] = {}

    def read(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            grams[name] = grams.get(name, 0) + 2 / 8 * x.t() @ x

        return hook

    blocks = find(model).blocks
    linears = {
        x.name: model.get_submodule(x.name)
        for block in (blocks[0], blocks[-1])
        for x in block.linears
    }
    for name, module in linears.items():
        module.register_forward_pre_hook(read(name))
    with torch.no_grad():
        for line in lines:
            model(input_ids=torch.tensor([json.loads(line)["input_ids"]]))
    return [(module.weight.detach(), grams[name]) for name, module in linears.items()]


@pytest.mark.parametrize(
    "model",
    ["llama", *(pytest.param(x, marks=pytest.mark.matrix) for x in ("mistral", "phi", "opt"))],
)
def test_the_better_the_method_the_smaller_the_output_error_on_hidden_activations(
    shared: Path, model: str
) -> None:
    problems = hidden_activations(shared, model)
    assert len(problems) == 2 * (7 if model in ("llama", "mistral") else 6)
    for ratio in (0.5, 0.7):
        alps, admm, sparsegpt, plain = mean_errors(problems, ratio)
        assert alps <= admm <= sparsegpt < plain


# What the pruners share.


@given(
    scores=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=4),
    data=st.data(),
)
def test_the_lower_index_of_equal_scores_goes(scores: list[list[int]], data: st.DataObject) -> None:
    counts = [data.draw(st.integers(0, 4)) for _ in scores]
    mask = neuroal.row_mask(torch.tensor(scores).float(), torch.tensor(counts))
    for row, count, found in zip(scores, counts, mask.tolist(), strict=True):
        gone = sorted(range(4), key=lambda j: (row[j], j))[:count]
        assert [j for j in range(4) if found[j]] == sorted(gone)


def test_a_factorisation_that_fails_climbs_the_ladder(caplog: pytest.LogCaptureFixture) -> None:
    weight, _ = problem(4, 6)
    gram = torch.ones(6, 6) + 0.0 * torch.eye(6)
    gram[0, 1] = gram[1, 0] = 1.05  # an eigenvalue of about -0.05
    with caplog.at_level(logging.WARNING):
        _, mask = prune(SparseGPT(), weight, gram, matrix(12))
    assert int(mask.sum()) == 12
    assert [r.getMessage() for r in caplog.records] == [
        "linear model.layers.3.mlp.up_proj: its Gram matrix cannot be factorised, damping raised "
        "to 0.1"
    ]


@pytest.mark.parametrize("pruner", [SparseGPT(), Admm(rho=0.01)])
def test_a_ladder_that_ends_fails_with_the_name_of_the_linear(pruner: Any) -> None:
    weight, _ = problem(4, 6)
    gram = torch.eye(6)
    gram[0, 1] = gram[1, 0] = -100.0
    with pytest.raises(NeuroalError, match=r"model\.layers\.3\.mlp\.up_proj"):
        prune(pruner, weight, gram, matrix(12))


def test_the_rungs_of_the_ladder() -> None:
    assert list(second_order.ladder(0.01)) == [0.01, 0.1, 1.0]
    assert list(second_order.ladder(0.0)) == pytest.approx([0.0, 0.001, 0.01, 0.1, 1.0])


def test_linears_on_one_gram_matrix_share_its_factor() -> None:
    _, gram = problem(1, 6)
    made = []

    def build() -> int:
        made.append(1)
        return len(made)

    assert second_order.once_per_gram(gram, "a", build) == 1
    assert second_order.once_per_gram(gram, "a", build) == 1
    assert second_order.once_per_gram(gram, "b", build) == 2
    other = gram.clone()  # of another linear, in between
    assert second_order.once_per_gram(other, "a", build) == 3
    assert second_order.once_per_gram(gram, "a", build) == 1
    gram += 1  # another matrix in the same place
    assert second_order.once_per_gram(gram, "b", build) == 4
    assert second_order.once_per_gram(gram.clone(), "b", build) == 5
    del gram, other
    assert second_order._computed == {}  # nothing outlives its matrix


def test_the_published_search_weighs_window_k_by_one_over_k() -> None:
    norm = FadingNorm()
    assert SparseGPT(published_code=True).required_statistics() == {"gram", norm}
    x = torch.randn(5, 3, 4)
    whole, parts = norm.init(4, x.device), [norm.init(4, x.device) for _ in range(2)]
    norm.update(whole, x)
    norm.update(parts[0], x[:2])
    norm.update(parts[1], x[2:4])
    norm.update(parts[1], x[4:])
    for j in range(4):
        square = sum(float((x[k, :, j] ** 2).sum()) / (k + 1) for k in range(5))
        assert float(norm.result(whole)[j]) == pytest.approx(square**0.5)
    assert norm.result(norm.merge(*parts)).equal(norm.result(whole))


# Linears of one shape, side by side.


def alike(count: int, rows: int = 8, columns: int = 24) -> list[tuple[Tensor, Tensor]]:
    """Problems of one shape; the first two share a Gram matrix, the third has dead inputs."""
    problems = [problem(rows, columns, seed) for seed in range(count)]
    problems[1] = problems[1][0], problems[0][1]
    dead = torch.arange(columns) % 5 == 2
    problems[2] = problems[2][0], problems[2][1].masked_fill(dead | dead[:, None], 0)
    return problems


def together(
    pruner: Any, problems: list[tuple[Tensor, Tensor]], targets: list[Target]
) -> list[tuple[Tensor, Tensor]]:
    weights = torch.stack([weight for weight, _ in problems])
    statistics = [Statistics({"gram": gram}) for _, gram in problems]
    linears = [
        testing.linear(*weights.shape[1:], name=f"model.layers.3.mlp.experts.{i}.up_proj")
        for i in range(len(problems))
    ]
    before = weights.clone()
    with torch.no_grad():
        answers = pruner.prune_linears(weights, targets, statistics, linears)
    assert weights.equal(before), "an input was written to"
    return [(answer.weight, answer.mask) for answer in answers]


SIDE_BY_SIDE = {
    "matrix": lambda i: matrix(60 + 30 * i, (60 + 30 * i) / 192),
    "paper": lambda i: matrix(60 + 30 * i, (60 + 30 * i) / 192, budget="paper"),
    "row": lambda i: Target(torch.arange(8) + 4 * i, 0.5),
    "pattern": lambda i: matrix(96, pattern=Pattern(2, 4)),
    "nothing": lambda i: matrix(0, 0.0),
    "everything": lambda i: matrix(192, 0.99),
}


@each_pruner
@pytest.mark.parametrize("kind", SIDE_BY_SIDE)
def test_linears_side_by_side_are_pruned_as_one_by_one(pruner: Any, kind: str) -> None:
    problems = alike(4)
    targets = [SIDE_BY_SIDE[kind](i) for i in range(4)]
    found = together(pruner, problems, targets)
    for (weight, gram), target, (moved, mask) in zip(problems, targets, found, strict=True):
        alone, alone_mask = prune(pruner, weight, gram, target)
        assert mask.equal(alone_mask)
        assert torch.allclose(moved, alone, rtol=1e-4, atol=1e-5)


def test_alps_goes_on_without_the_linears_whose_support_has_settled() -> None:
    problems, target = alike(4), matrix(100)

    def settled(weight: Tensor, gram: Tensor) -> int:
        final = prune(Alps(gradient_steps=0), weight, gram, target)[0]
        for steps in range(3, 301, 3):
            early = prune(Alps(gradient_steps=0, iterations=steps), weight, gram, target)[0]
            if early.equal(final):
                return steps
        raise AssertionError("never settled")

    assert len({settled(*each) for each in problems}) > 1
    found = together(Alps(gradient_steps=0), problems, [target] * 4)
    for each, (moved, mask) in zip(problems, found, strict=True):
        assert (mask.numpy() == slow_alps_mask(*each, 100)[1]).all()
        assert torch.allclose(moved, prune(Alps(gradient_steps=0), *each, target)[0], atol=1e-5)


def test_the_ladder_is_climbed_by_one_linear_alone(caplog: pytest.LogCaptureFixture) -> None:
    problems = alike(4, 4, 6)
    problems[3] = problems[3][0], torch.ones(6, 6)
    problems[3][1][0, 1] = problems[3][1][1, 0] = 1.05  # an eigenvalue of about -0.05
    with caplog.at_level(logging.WARNING):
        found = together(SparseGPT(), problems, [matrix(12)] * 4)
    assert [r.getMessage() for r in caplog.records] == [
        "linear model.layers.3.mlp.experts.3.up_proj: its Gram matrix cannot be factorised, "
        "damping raised to 0.1"
    ]
    for (weight, gram), (moved, mask) in zip(problems, found, strict=True):
        alone, alone_mask = prune(SparseGPT(), weight, gram, matrix(12))
        assert mask.equal(alone_mask) and torch.allclose(moved, alone, atol=1e-5)


@pytest.mark.parametrize("pruner", [SparseGPT(), Admm(rho=0.01)])
def test_what_cannot_be_factorised_is_named_among_many(pruner: Any) -> None:
    problems = alike(4, 4, 6)
    problems[2] = problems[2][0], torch.eye(6)
    problems[2][1][0, 1] = problems[2][1][1, 0] = -100.0
    with pytest.raises(NeuroalError, match=r"experts\.2\.up_proj"):
        together(pruner, problems, [matrix(12)] * 4)


# Importance of rows: c times the error of a row is the error of a row that is c times as large.


@pytest.mark.parametrize("name", ["sparsegpt", "admm", "alps"])
@pytest.mark.parametrize("seed", range(3))
def test_importance_is_the_same_pruner_on_larger_rows(name: str, seed: int) -> None:
    weight, gram = problem(4, 12, seed)
    importance = torch.tensor([1.0, 4.0, 0.25, 2.0])  # which no rounding can tell
    plugin = load([("pruner", name)])[0]
    statistics = Statistics({"gram": gram})
    target = matrix(29)
    scaled, mask = prune(plugin.instance, weight * importance[:, None], gram, target)
    weighed = replace(target, importance=Importance(importance))
    found = update(plugin, 0, [linear(weight)], weight[None], [statistics], [weighed])[0]
    assert found.mask.equal(mask) and int(mask.sum()) == 29
    assert found.weight.equal(scaled / importance[:, None])
    assert not prune(plugin.instance, weight, gram, target)[1].equal(mask)


@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_with_importance_is_optimal_brain_surgery_of_weighed_errors(seed: int) -> None:
    """Saliency of a weight times its row's c²; the update of a row does not depend on its c."""
    weight, gram = problem(4, 12, seed)
    importance = torch.tensor([1.0, 3.0, 0.3, 1.7])
    weighed = importance.double().numpy()[:, None] ** 2

    def choose(saliency: np.ndarray) -> set[tuple[int, int]]:
        return slow_smallest(saliency * weighed, 29)

    expected, mask = slow_sparsegpt(weight, gram, choose, [range(0, 12)])
    plugin = load([("pruner", "sparsegpt")])[0]
    target = matrix(29, importance=Importance(importance))
    statistics = Statistics({"gram": gram})
    found = update(plugin, 0, [linear(weight)], weight[None], [statistics], [target])[0]
    assert (found.mask.numpy() == mask).all()
    assert close(found.weight, expected)
