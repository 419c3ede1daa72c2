"""Nowag passes neuroal's checks, and scores as its equation says."""

import pytest
import torch
from neuroal_nowag import Nowag

from neuroal.testing import PrunerConformance, statistics


class TestNowag(PrunerConformance):
    """The checks that every pruner has to pass, as the paper has it and row by row."""

    @pytest.fixture(params=["matrix", "row"])
    def plugin(self, request: pytest.FixtureRequest) -> Nowag:
        return Nowag(comparison=request.param)


def test_score_by_hand() -> None:
    # c = (5, 2) leaves the rows (0.6, 0) and (0.8, 1) of squared norms 0.36 and 1.64.
    weight = torch.tensor([[3.0, 0.0], [-4.0, 2.0]])
    scores = Nowag().score_weights(weight, statistics(input_norm=[1.0, 2.0]))
    expected = torch.tensor([[1.0, 0.0], [0.64 / 1.64, 4 / 1.64]])
    assert torch.allclose(scores, expected)


def test_scale_of_a_column_is_no_matter() -> None:
    weight, norms = torch.tensor([[3.0, 1.0], [-4.0, 2.0]]), statistics(input_norm=[1.0, 2.0])
    scores = Nowag().score_weights(weight, norms)
    again = Nowag().score_weights(weight * torch.tensor([100.0, 0.5]), norms)
    assert torch.allclose(again, scores)


def test_empty_rows_and_columns() -> None:
    weight = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    scores = Nowag().score_weights(weight, statistics(input_norm=[1.0, 3.0]))
    assert scores.tolist() == [[0.0, 0.0], [0.0, 9.0]]
