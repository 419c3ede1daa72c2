"""Scores of the base pruners against sums done by hand and slow second formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuroal import PrunerTraits
from neuroal.options import bind
from neuroal.walk.statistics import Statistics
from neuroal_plugins.pruner.magnitude import Magnitude
from neuroal_plugins.pruner.multiflow import Multiflow
from neuroal_plugins.pruner.ria import Ria
from neuroal_plugins.pruner.wanda import Wanda

SHAPES = [(1, 1), (1, 5), (5, 1), (4, 6), (7, 3)]


def score(pruner: Any, weight: Tensor, norm: Tensor) -> Tensor:
    """The scores, whichever arguments the pruner's hook takes."""
    if isinstance(pruner, Magnitude):
        return pruner.score_weights(weight)
    return pruner.score_weights(weight, Statistics({"input_norm": norm}))


def example(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight, torch.rand(shape[1], generator=generator) + 0.1


def test_magnitude_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.5]])
    assert score(Magnitude(), weight, torch.ones(2)).tolist() == [[1, 2], [0, 0.5]]


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.5, -0.25]])
    scores = score(Wanda(), weight, torch.tensor([4.0, 0.5, 2.0]))
    assert scores.tolist() == [[4, 1, 6], [0, 0.25, 0.5]]


def test_multiflow_by_hand() -> None:
    # A = [[2, 2], [4, 0]], so r = (2, 2) and c = (3, 1).
    weight = torch.tensor([[1.0, -2.0], [2.0, 0.0]])
    scores = score(Multiflow(), weight, torch.tensor([2.0, 1.0]))
    assert scores.tolist() == [[6, 4], [12, 0]]


def test_ria_by_hand() -> None:
    # Column sums (4, 4), row sums (2, 6), square roots of the norms (2, 3).
    weight = torch.tensor([[1.0, -1.0], [3.0, 3.0]])
    scores = score(Ria(), weight, torch.tensor([4.0, 9.0]))
    assert scores.tolist() == [[0.75 * 2, 0.75 * 3], [1.25 * 2, 1.25 * 3]]


@pytest.mark.parametrize("shape", SHAPES)
def test_multiflow_is_its_definition(shape: tuple[int, int]) -> None:
    weight, norm = example(shape)
    w, n = weight.tolist(), norm.tolist()
    rows, columns = range(shape[0]), range(shape[1])
    flow = [[abs(w[i][j]) * n[j] for j in columns] for i in rows]
    expected = [
        [
            abs(w[i][j]) * (sum(flow[i]) / shape[1]) * (sum(flow[k][j] for k in rows) / shape[0])
            for j in columns
        ]
        for i in rows
    ]
    torch.testing.assert_close(score(Multiflow(), weight, norm), torch.tensor(expected))


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_ria_is_its_definition(shape: tuple[int, int], a: float) -> None:
    weight, norm = example(shape)
    w, n = weight.tolist(), norm.tolist()
    rows, columns = range(shape[0]), range(shape[1])
    expected = [
        [
            abs(w[i][j])
            * (1 / sum(abs(w[k][j]) for k in rows) + 1 / sum(abs(x) for x in w[i]))
            * math.pow(n[j], a)
            for j in columns
        ]
        for i in rows
    ]
    torch.testing.assert_close(score(Ria(a=a), weight, norm), torch.tensor(expected))


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), Multiflow(), Ria()])
@given(seed=st.integers(0, 1000), out=st.integers(1, 6), width=st.integers(1, 6))
def test_permuted_weights_have_permuted_scores(
    pruner: Any, seed: int, out: int, width: int
) -> None:
    weight, norm = example((out, width), seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(k, generator=generator) for k in (out, width))
    permuted = score(pruner, weight[rows][:, columns], norm[columns])
    torch.testing.assert_close(permuted, score(pruner, weight, norm)[rows][:, columns])


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), Multiflow(), Ria(), Ria(a=0.0)])
@pytest.mark.parametrize("spoil", ["weights", "row", "column", "inputs", "input"])
def test_zeros_score_finite(pruner: Any, spoil: str) -> None:
    weight, norm = example((4, 6))
    if spoil == "weights":
        weight.zero_()
    elif spoil == "row":
        weight[1] = 0
    elif spoil == "column":
        weight[:, 2] = 0
    else:
        norm[slice(None) if spoil == "inputs" else slice(1)] = 0
    scores = score(pruner, weight, norm)
    assert scores.shape == weight.shape
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert (scores[weight == 0] == 0).all()


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), Multiflow(), Ria()])
def test_inputs_are_not_written_to(pruner: Any) -> None:
    weight, norm = example((4, 6))
    before = weight.clone(), norm.clone()
    score(pruner, weight, norm)
    assert torch.equal(weight, before[0])
    assert torch.equal(norm, before[1])


def test_multiflow_does_not_underflow_in_half_precision() -> None:
    weight = torch.full((2, 2), 1e-3, dtype=torch.float16)
    scores = score(Multiflow(), weight, torch.full((2,), 1e-2, dtype=torch.float16))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.full((2, 2), 1e-13), rtol=0.01, atol=0)


@pytest.mark.parametrize(("pruner", "own"), [(Magnitude, "row"), (Ria, "matrix")])
def test_comparison_is_reported(pruner: Callable[..., Any], own: str) -> None:
    assert pruner().describe() == PrunerTraits(comparison=own)
    for comparison in ("row", "matrix"):
        assert pruner(comparison=comparison).describe().comparison == comparison


def test_options_from_the_command_line() -> None:
    ria = bind(Ria, {"a": "0.25", "comparison": "row"}, "ria")
    assert (ria.a, ria.comparison) == (0.25, "row")
    with pytest.raises(Exception, match=r"a=-1\.0 is negative"):
        bind(Ria, {"a": "-1"}, "ria")


def test_statistics_are_the_input_norms() -> None:
    for pruner in (Wanda(), Multiflow(), Ria()):
        assert pruner.required_statistics() == {"input_norm"}
    assert not hasattr(Magnitude(), "required_statistics")
