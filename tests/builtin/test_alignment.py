"""Alignment metrics against sums done by hand and slow second formulas."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuroal.walk.statistics import Statistics
from neuroal_plugins.alignment import output_kl
from neuroal_plugins.alignment.cosine import Cosine
from neuroal_plugins.alignment.neuron import Neuron
from neuroal_plugins.alignment.output_kl import OutputKl
from neuroal_plugins.alignment.relative_l2 import RelativeL2

NORMS = [Neuron(), Cosine()]
vectors = st.lists(
    st.one_of(st.just(0.0), st.floats(2**-10, 2**10, width=32)), min_size=1, max_size=8
)


def stats(values: list[float], error: list[float] | None = None) -> Statistics:
    results = {"input_norm": torch.tensor(values, dtype=torch.float32)}
    if error is not None:
        results["input_error"] = torch.tensor(error, dtype=torch.float32)
    return Statistics(results)


def measure(metric: Any, a: list[float], b: list[float]) -> float:
    result = metric.measure_linear(stats(a), stats(b))
    assert result.shape == ()
    return float(result)


def test_neuron_by_hand() -> None:
    # Shares (1/4, 3/4) and (3/4, 1/4): distance sqrt(1/2), over 2 inputs.
    assert measure(Neuron(), [1, 3], [6, 2]) == pytest.approx(math.sqrt(0.5) / 2)


def test_neuron_is_its_definition() -> None:
    a, b = torch.rand(50).tolist(), torch.rand(50).tolist()
    squares = [(x / sum(a) - y / sum(b)) ** 2 for x, y in zip(a, b, strict=True)]
    assert measure(Neuron(), a, b) == pytest.approx(math.sqrt(sum(squares)) / 50, rel=1e-5)


def test_neuron_is_the_published_float32() -> None:
    a, b = torch.rand(192), torch.rand(192)
    expected = torch.norm(a / torch.sum(a) - b / torch.sum(b)) / a.shape[0]
    result = Neuron().measure_linear(stats(a.tolist()), stats(b.tolist()))
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_cosine_by_hand() -> None:
    assert measure(Cosine(), [3, 4], [4, 3]) == pytest.approx(1 - 24 / 25, rel=1e-5)
    assert measure(Cosine(), [1, 0], [0, 2]) == pytest.approx(1)


def test_cosine_is_its_definition_without_cancellation() -> None:
    a = [1.0, 1.0]
    b = [1.0, 1.001]  # 1 - cos is 1.2e-7, one unit of float32 rounding
    exact = torch.tensor([a, [1.0, float(torch.tensor(1.001))]], dtype=torch.float64)
    expected = 1 - torch.nn.functional.cosine_similarity(exact[0], exact[1], dim=0)
    assert measure(Cosine(), a, b) == pytest.approx(float(expected), rel=1e-3)


def test_cosine_of_silence() -> None:
    assert measure(Cosine(), [0, 0], [0, 0]) == 0
    assert measure(Cosine(), [0, 0], [1, 2]) == 1
    assert measure(Cosine(), [1, 2], [0, 0]) == 1


@pytest.mark.parametrize("metric", NORMS)
@given(a=vectors, seed=st.integers(0, 99))
def test_norm_metrics_are_distances(metric: Any, a: list[float], seed: int) -> None:
    b = (torch.tensor(a)[torch.randperm(len(a), generator=torch.manual_seed(seed))]).tolist()
    assert measure(metric, a, a) == 0
    assert measure(metric, a, b) >= 0
    assert measure(metric, a, b) == pytest.approx(measure(metric, b, a), rel=1e-4, abs=1e-12)
    assert math.isfinite(measure(metric, a, [0.0] * len(a)))


@pytest.mark.parametrize("metric", NORMS)
def test_norm_metrics_ignore_scale(metric: Any) -> None:
    a = torch.rand(20).tolist()
    assert measure(metric, a, [8 * x for x in a]) == 0


def test_relative_l2_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 3, 5, 4, generator=generator)  # windows, tokens, inputs
    dense = stats((x.square().sum((0, 1)) / 3).sqrt().tolist())
    pruned = stats([0.0] * 4, ((x - y).square().sum((0, 1)) / 3).tolist())
    expected = math.sqrt(
        sum((p - q) ** 2 for p, q in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
        / sum(p**2 for p in x.flatten().tolist())
    )
    assert float(RelativeL2().measure_linear(dense, pruned)) == pytest.approx(expected, rel=1e-5)


def test_relative_l2_edges() -> None:
    metric = RelativeL2()
    assert metric.measure_linear(stats([1, 2]), stats([1, 2], [0, 0])) == 0
    assert metric.measure_linear(stats([0, 0]), stats([0, 0], [0, 0])) == 0
    assert metric.measure_linear(stats([0, 0]), stats([2, 0], [4, 0])) == 2
    assert metric.measure_linear(stats([3]), stats([3], [36])) == 2  # 6 / 3


def divergence(dense: Tensor, pruned: Tensor) -> float:
    """Mean of sum p ln(p / q) over windows and tokens, in plain Python."""
    total = 0.0
    tokens = dense.flatten(0, 1).tolist(), pruned.flatten(0, 1).tolist()
    for row_p, row_q in zip(*tokens, strict=True):
        norm_p, norm_q = sum(map(math.exp, row_p)), sum(map(math.exp, row_q))
        for p, q in zip(row_p, row_q, strict=True):
            total += math.exp(p) / norm_p * ((p - math.log(norm_p)) - (q - math.log(norm_q)))
    return total / len(tokens[0])


def test_output_kl_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2.
    dense = torch.zeros(1, 1, 2)
    pruned = torch.tensor([[[0.0, math.log(3.0)]]])
    result = OutputKl().measure_output(dense, pruned)
    assert result.shape == ()
    assert float(result) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (3, output_kl.CHUNK + 5, 4)])
def test_output_kl_is_its_definition(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    dense, pruned = torch.randn(2, *shape, generator=generator)
    result = float(OutputKl().measure_output(dense, pruned))
    assert result == pytest.approx(divergence(dense, pruned), rel=1e-5, abs=1e-9)


def test_output_kl_laws() -> None:
    metric = OutputKl()
    dense, pruned = torch.randn(2, 4, 6, 11)
    assert metric.measure_output(dense, dense) == 0
    assert metric.measure_output(dense, dense + 3) == pytest.approx(0, abs=1e-6)
    assert metric.measure_output(dense, dense + 3) >= 0
    halves = [metric.measure_output(dense[i], pruned[i]) for i in (slice(2), slice(2, 4))]
    assert float(sum(halves)) / 2 == pytest.approx(float(metric.measure_output(dense, pruned)))


def test_output_kl_of_excluded_words() -> None:
    dense = torch.tensor([[[0.0, 0.0, -math.inf]]])
    assert OutputKl().measure_output(dense, dense) == 0
    finite = OutputKl().measure_output(dense, torch.zeros(1, 1, 3))
    assert float(finite) == pytest.approx(math.log(1.5))


def test_output_kl_is_float32_inside() -> None:
    dense = (torch.randn(2, 8, 50) * 4).bfloat16()
    pruned = (torch.randn(2, 8, 50) * 4).bfloat16()
    expected = divergence(dense.float(), pruned.float())
    assert float(OutputKl().measure_output(dense, pruned)) == pytest.approx(expected, rel=1e-4)


def test_statistics() -> None:
    for metric in NORMS:
        assert metric.required_statistics() == {"input_norm"}
    assert RelativeL2().required_statistics() == {"input_norm", "input_error"}
