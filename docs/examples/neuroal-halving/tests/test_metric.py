"""The metric passes neuroal's checks, and has the values of its paper's equation."""

import pytest
from neuroal_halving import CorrelationDistance

from neuroal.testing import AlignmentConformance, statistics

ONES = [[1.0] * 4] * 4
HALVES = [[1.0, 0.0, 0.5, 0.5], [0.0, 1.0, 0.5, 0.5], [0.5, 0.5, 1.0, 0.5], [0.5, 0.5, 0.5, 1.0]]
PAIR = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]


class TestCorrelationDistance(AlignmentConformance):
    """The checks that every alignment metric has to pass."""

    @pytest.fixture
    def plugin(self) -> CorrelationDistance:
        return CorrelationDistance()


@pytest.mark.parametrize(
    ("dense", "pruned", "expected"),
    [
        # R, package MESS, manual of cmd().
        (ONES, ONES, 0.0),
        (ONES, HALVES, 0.1174774),
        (HALVES, PAIR, 0.3594874),
        # By hand: 1 - 1 / sqrt(2); a matrix that is all zero.
        ([[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 0.0]], 0.2928932),
        ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]], 1.0),
    ],
)
def test_known_values(dense: list[list[float]], pruned: list[list[float]], expected: float) -> None:
    found = CorrelationDistance().measure_linear(statistics(gram=dense), statistics(gram=pruned))
    assert float(found) == pytest.approx(expected, abs=1e-6)
