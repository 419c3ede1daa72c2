"""The search passes neuroal's checks, and halves its candidates."""

import pytest
import torch
from neuroal_halving import HALVING, SuccessiveHalving

from neuroal import Measurement, Proposal
from neuroal.testing import BlockRatiosConformance, layout


class TestSuccessiveHalving(BlockRatiosConformance):
    """The checks that every strategy of block ratios has to pass."""

    @pytest.fixture(params=[1, 2, 16])
    def plugin(self, request: pytest.FixtureRequest) -> SuccessiveHalving:
        return SuccessiveHalving(candidates=request.param)


def first_ratio(proposal: Proposal) -> float:
    return float(proposal.ratios["blocks.0.q"])


def test_halves_and_doubles() -> None:
    """Costs are the first block's ratio: the densest first block of all has to win."""
    rng = torch.Generator().manual_seed(0)
    steps = SuccessiveHalving(candidates=5, spread=0.25).propose_block_ratios(layout(2), 0.5, rng)
    rounds, answer = [], None
    try:
        while True:
            asked = steps.send(answer)  # type: ignore[arg-type]
            rounds.append(asked)
            answer = [Measurement(first_ratio(p), False, 1) for p in asked.proposals]
    except StopIteration as stop:
        winner = stop.value
    assert [(len(r.proposals), r.drop_early, r.windows) for r in rounds] == [
        (5, False, 1),
        (3, False, 2),
        (2, True, 4),
        (1, True, None),
    ]
    assert first_ratio(winner) == min(first_ratio(p) for p in rounds[0].proposals)
    assert first_ratio(rounds[0].proposals[0]) == 0.5


def test_ratios_stay_around_the_sparsity() -> None:
    rng = torch.Generator().manual_seed(0)
    steps = SuccessiveHalving(candidates=50, spread=0.2).propose_block_ratios(layout(3), 0.9, rng)
    proposals = next(steps).proposals
    ratios = [float(r) for p in proposals for r in p.ratios.values()]
    assert 0.8 <= min(ratios) < 0.85
    assert 0.95 < max(ratios) <= 1.0


@pytest.mark.parametrize("options", [{"candidates": 0}, {"spread": 0.0}, {"spread": 1.0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SuccessiveHalving(**options)  # type: ignore[arg-type]


def test_preset_names_both() -> None:
    assert HALVING.block_ratios == ("successive_halving",)
    assert HALVING.alignment == "correlation_distance"
